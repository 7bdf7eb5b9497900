"""What a failed call was: the server's own words, or why there was no answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from cluster.client.connection import Connection
from cluster.wire.retry_after import RETRY_AFTER_KEY
from workers.errors import BatonError

_NOT_CONNECTED = (
    "failed to connect",
    "dns resolution failed",
    "connections to all backends failing",
    "endpoint closing",
    "socket closed",
    "connection reset",
)
_CLOSED = ("socket closed", "connection reset", "endpoint closing", "broken pipe")
_NOBODY_THERE = "is `baton up` running there, and does it listen on that address?"


class BatonClientError(BatonError):
    """A call failed; the text is the server's, or says why there was no answer.

    Attributes:
        status: the gRPC status.
        retry_after_s: seconds after which the server expects to have room; None where it did not say.
    """

    def __init__(self, status: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@contextmanager
def call_errors(connection: Connection) -> Iterator[None]:
    """Turn gRPC's errors in the block into `BatonClientError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise _client_error(connection, error) from error


def _client_error(connection: Connection, error: Any) -> BatonClientError:
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNAVAILABLE and details.lower().startswith(_NOT_CONNECTED):
        tls = "with TLS" if connection.tls_ca else "without TLS"
        reason = why_not_connected(connection, details)
        return BatonClientError(status, f"cannot reach a Baton server at {connection.address} ({tls}): {reason}")
    retry_after_ms = dict(error.trailing_metadata() or ()).get(RETRY_AFTER_KEY)
    return BatonClientError(
        status,
        f"{status.name}: {details}" if details else status.name,
        None if retry_after_ms is None else float(retry_after_ms) / 1e3,
    )


def why_not_connected(connection: Connection, details: str) -> str:
    """What to do about a connection that did not come about, and gRPC's own words.

    Args:
        connection: that was tried.
        details: gRPC's, of the status UNAVAILABLE.
    """
    said = " ".join(details.rpartition("last error: ")[2].split())
    return f"{_advice(connection, said.lower())} [{said}]"


def _advice(connection: Connection, said: str) -> str:
    if "certificate has expired" in said or "certificate is not yet valid" in said:
        when = "has expired" if "expired" in said else "is not valid yet"
        return f"the server's certificate {when}"
    if "hostname verification" in said:
        return f"the server's certificate is not for {_host(connection)}: give a name that it has as the address"
    if "certificate_verify_failed" in said:
        return f"the server's certificate is not signed by any in {connection.tls_ca}"
    if "wrong_version_number" in said:
        return "what listens there does not speak TLS: leave the CA file out"
    if any(word in said for word in _CLOSED):
        if connection.tls_ca is None:
            return "what listens there closed the connection; it may want TLS: give its CA file"
        if connection.tls_cert is None:
            return "the server closed the connection; it may ask for a client certificate: give one and its key"
        return "the server closed the connection; it may not trust this client's certificate"
    if "security handshaker" in said:
        return "the TLS files cannot be used"
    if "dns" in said or "resol" in said:
        return f"the name {_host(connection)} cannot be resolved"
    return _NOBODY_THERE


def _host(connection: Connection) -> str:
    return connection.target.rpartition(":")[0]
