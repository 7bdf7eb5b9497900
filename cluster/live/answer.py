"""An answer over HTTP, and who gives one; knows neither the service nor a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

MAX_BODY_BYTES = 256 * 1024


@dataclass(frozen=True)
class Answer:
    """An answer: a status of HTTP, headers with names in lower case, and a body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Responder(Protocol):
    """Who answers requests, whatever server carries them."""

    async def respond(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """Answer one request.

        Args:
            method: GET, HEAD or POST.
            path: without the query.
            headers: names in lower case.
            body: of a POST, at most `MAX_BODY_BYTES`.
        """
        ...
