"""Who may call: a bearer token that may generate, which every call but those about health must carry."""

from __future__ import annotations

from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import caller
from cluster.errors import AuthenticationError, ForbiddenError
from cluster.server.credentials import Credentials
from cluster.server.openai.errors import answer_of
from cluster.wire.auth import HEADER, Role, authorize

_OPEN_PATHS = frozenset({"/health", "/ready"})


class BearerTokenMiddleware:
    """Refuses calls that carry none of the keys with 401, those whose key may not generate with 403, unread.

    Args:
        app: what is behind it.
        credentials: the good ones, asked for at each call.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials) -> None:
        self._app = app
        self._credentials = credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on, or refuse."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == HEADER.encode()]
        try:
            tenant = authorize(given, Role.GENERATE, self._credentials())
        except AuthenticationError as error:
            await answer_of(_as_said_here(error, bool(given))).response()(scope, receive, send)
            return
        caller.accept(replace(caller.current_caller(), tenant=tenant))
        await self._app(scope, receive, send)


def _as_said_here(error: AuthenticationError, given: bool) -> AuthenticationError:
    """The refusal in the words of this interface, whose tokens are called keys."""
    if isinstance(error, ForbiddenError):
        return error
    none = "the call carries no API key: send it as `Authorization: Bearer KEY`"
    return AuthenticationError("wrong API key" if given else none)
