"""Whose call it is that comes over HTTP."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import caller
from cluster.caller import Caller


class CallerMiddleware:
    """Says it to whoever asks while the call is answered; see `cluster.caller`.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on."""
        host, _ = scope.get("client") or ("", 0)
        caller.accept(Caller(str(host)))
        await self._app(scope, receive, send)
