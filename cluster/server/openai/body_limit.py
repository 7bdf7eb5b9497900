"""The bound on a request's body, before anything of it is parsed."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.server.openai.errors import Answer, Kind

_TOO_LARGE = Kind(413, "invalid_request_error", "request_too_large")


class BodyLimitMiddleware:
    """Refuses larger bodies with 413: by what their header says, else when so much has come.

    Args:
        app: what is behind it.
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on with a bounded body, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        message = f"the body has more than the {self._max_bytes} bytes that are allowed"
        if told.isdigit() and int(told) > self._max_bytes:
            # What still comes is dropped and not answered by closing, which would take the answer from the client.
            await Answer(_TOO_LARGE, message).response()(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            part = await receive()
            taken += len(part.get("body", b""))
            if taken > self._max_bytes:
                raise HTTPException(413, message)
            return part

        await self._app(scope, bounded, send)
