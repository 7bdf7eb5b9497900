"""The bound on a request's body, before anything of it is parsed."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.server.held_bytes import HeldBytes, HeldRequest
from cluster.server.openai.errors import Answer, Kind

_TOO_LARGE = Kind(413, "invalid_request_error", "request_too_large")


class BodyLimitMiddleware:
    """Refuses larger bodies with 413, by what their header says, else when so much has come; and where all requests
    hold too much, with 429.

    Args:
        app: what is behind it.
        max_bytes: of a body.
        held: what all requests hold.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, held: HeldBytes) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = held
        self._too_large = f"the body has more than the {max_bytes} bytes that are allowed"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on with a bounded body, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if told.isdigit() and int(told) > self._max_bytes:
            # What still comes is dropped and not answered by closing, which would take the answer from the client.
            await Answer(_TOO_LARGE, self._too_large).response()(scope, receive, send)
            return
        with self._held.request((scope.get("client") or ("",))[0]) as request:
            await self._app(scope, self._bounded(receive, request), send)

    def _bounded(self, receive: Receive, request: HeldRequest) -> Receive:
        whole = False

        async def bounded() -> Message:
            nonlocal whole
            if whole:  # only the client's leaving is still to come
                return await receive()
            async with request.coming():
                part = await receive()
            whole = not part.get("more_body", False)
            request.add(len(part.get("body", b"")))
            if request.size > self._max_bytes:
                raise HTTPException(413, self._too_large)
            return part

        return bounded
