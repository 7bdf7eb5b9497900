"""Who answers over HTTP from a service's first second on: the page at once, the rest when there is something to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cluster.live.answer import Answer, Responder
from cluster.live.page_files import page_file

_RETRY_AFTER_S = "2"


class StartingAnswers:
    """Answers for a service that is starting, and hands over to the one that runs.

    Attributes:
        step: what the start is at, in words.
        running: who answers when the service runs; None: it does not yet, or no more.
    """

    def __init__(self) -> None:
        self.step = "it has just begun"
        self.running: Responder | None = None

    async def respond(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """See `Responder.respond`; before the service runs all but the page is 503, with the step in JSON."""
        if self.running is not None:
            return await self.running.respond(method, path, headers, body)
        page = page_file(path) if method in ("GET", "HEAD") else None
        if page is not None:
            return page
        said = json.dumps({"starting": self.step}).encode()
        fields = {"content-type": "application/json", "cache-control": "no-store", "retry-after": _RETRY_AFTER_S}
        return Answer(503, said, fields)
