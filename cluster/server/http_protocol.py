"""HTTP connections that are bounded in number, and closed when nothing comes through them."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import QueueFullError
from cluster.server.connections import HEAD_LIMIT_S
from cluster.server.host_connections import HostConnections

MAX_HEAD_BYTES = 64 * 1024
"""Of a request: its first line and its headers."""
MAX_SMALL_PIECES = 4096
"""Chunks of a body that may have fewer than `SMALL_PIECE_BYTES` on average."""
SMALL_PIECE_BYTES = 256


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's own closes what is idle after an answer; this one what has not asked anything yet, too.

    Args:
        open_ones: all connections.
        head_limit_s: for the head of a request to be there.
    """

    def __init__(
        self, *args: Any, open_ones: HostConnections, head_limit_s: float = HEAD_LIMIT_S, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._open_ones = open_ones
        self._head_limit_s = head_limit_s
        self._host: str | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._head_bytes = self._pieces = self._body_bytes = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """One more, if there is room for it."""
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        try:
            self._open_ones.add(host, self)
        except QueueFullError as error:
            transport.write(_refusal(str(error)))
            transport.close()
            return
        self._host = host
        self._set_alarm()

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered: no request is whole that is not answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def end(self) -> None:
        """Make room for somebody else."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """One less."""
        self._stop_alarm()
        if self._host is not None:
            self._open_ones.remove(self._host, self)
            self._host = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request: its head is to be whole soon."""
        super().data_received(data)
        if self._alarm is None and (self.cycle is None or self.cycle.response_complete):
            self._set_alarm()
        # What still comes of a body that was refused is dropped, and nobody's head.
        self._head_bytes = self._head_bytes + len(data) if self._alarm is not None and not self._in_body else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of the request has more than {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._stop_alarm()
        self._pieces = self._body_bytes = 0
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is here; what comes next is a head."""
        self._in_body = False
        super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body; each costs as much as a kilobyte, so that a body in crumbs is none."""
        self._pieces, self._body_bytes = self._pieces + 1, self._body_bytes + len(body)
        if self._pieces > MAX_SMALL_PIECES and self._body_bytes < SMALL_PIECE_BYTES * self._pieces:
            if not self.transport.is_closing():
                self.send_400_response(f"the body has more than {MAX_SMALL_PIECES} chunks of few bytes")
            return
        super().on_body(body)

    def _set_alarm(self) -> None:
        self._alarm = self.loop.call_later(self._head_limit_s, self._close)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _close(self) -> None:
        self._alarm = None
        self.transport.abort()


def bounded_http(open_ones: HostConnections) -> Any:
    """What `uvicorn.Config` takes as `http`: a class, as far as it looks."""
    return partial(BoundedProtocol, open_ones=open_ones)


def _refusal(text: str) -> bytes:
    """A whole answer to a request that has not been read."""
    error = {"message": text, "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    body = json.dumps({"error": error}).encode()
    head = (
        "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
