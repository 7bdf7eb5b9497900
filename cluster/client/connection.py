"""Where a server is and how to talk to it: address, TLS, token."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.wire.auth import bearer
from workers.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_RESPONSE_BYTES = 64 * 2**20
_DEFAULT_PORT = DEFAULT_ADDRESS.rpartition(":")[2]
_OWN_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:")
"""Of gRPC's own forms of an address, which are taken as they are."""


@dataclass(frozen=True)
class Connection:
    """Where a server is and how to talk to it.

    Attributes:
        address: host:port, or a host, for the default port; an IPv6 address with a port has brackets.
        tls_ca: PEM file with the certificates to trust; given, it turns TLS on.
        tls_cert: PEM file with this client's own certificate, if the server asks for one.
        tls_key: PEM file with its key.
        token: bearer token.
    """

    address: str = DEFAULT_ADDRESS
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token: str | None = None

    @classmethod
    def of(cls, given: Connection | str | None) -> Connection:
        """A connection as it is, one to an address, or one to the default address.

        Raises:
            ConfigError: it is none of these; the text has the value.
        """
        if isinstance(given, Connection):
            return given
        if given is not None and not isinstance(given, str):
            raise ConfigError(f"the server is {given!r}, expected an address host:port or a Connection")
        return cls() if given is None else cls(given)

    @property
    def target(self) -> str:
        """The address as gRPC takes it.

        Raises:
            ConfigError: it is no host and port.
        """
        address = self.address.strip() if isinstance(self.address, str) else ""
        if address.startswith(_OWN_SCHEMES):
            return address
        if not address or "://" in address or "/" in address or any(map(str.isspace, address)):
            raise ConfigError(
                f"the server's address is {self.address!r}, expected host:port, such as {DEFAULT_ADDRESS}"
            )
        if address.count(":") > 1 and not address.startswith("["):
            return f"[{address}]:{_DEFAULT_PORT}"
        host, colon, port = address.rpartition(":") if not address.endswith("]") else (address, "", "")
        if not colon:
            return f"{address}:{_DEFAULT_PORT}"
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"the server's address is {self.address!r}: {port!r} is no port, or there is no host")
        return address

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What TLS takes; None: there is to be none.

        Raises:
            ConfigError: files are missing, cannot be read, or are not what they should be; names them.
        """
        if self.tls_ca is None:
            if self.tls_cert is not None or self.tls_key is not None:
                raise ConfigError("a client certificate needs TLS: give the server's CA file too")
            return None
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a client certificate and its key must be given together")
        paths = (self.tls_ca, self.tls_key, self.tls_cert)
        try:
            contents = [None if path is None else Path(path).read_bytes() for path in paths]
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
        self._check_files()
        return grpc.ssl_channel_credentials(*contents)

    def _check_files(self) -> None:
        """Refuse files that gRPC would fail with only when it connects, without saying why."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.tls_ca)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"{self.tls_ca} (the CA file) holds no PEM certificates: {_reason(error)}") from error
        if self.tls_cert is None:
            return
        try:
            # Without the callback OpenSSL would ask for the password of an encrypted key on the terminal.
            context.load_cert_chain(self.tls_cert, self.tls_key, password=lambda: "")
        except (ssl.SSLError, ValueError) as error:
            files = f"{self.tls_cert} and {self.tls_key}"
            raise ConfigError(f"{files} are no PEM certificate with its key: {_reason(error)}") from error

    def metadata(self) -> list[tuple[str, str]]:
        """What every call carries.

        Raises:
            ConfigError: the token holds characters that a header cannot carry.
        """
        return [] if self.token is None else [bearer(self.token)]


def _reason(error: ssl.SSLError | ValueError) -> str:
    reason = getattr(error, "reason", None) or str(error)
    return str(reason).replace("_", " ").lower()
