"""Who may call: a bearer token that every call but those about health must carry."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import AuthenticationError
from cluster.server.openai.errors import answer_of
from cluster.wire.auth import HEADER, bearer

_OPEN_PATHS = frozenset({"/health", "/ready"})


class BearerTokenMiddleware:
    """Refuses calls that carry none of the keys with 401, before their body is read.

    Args:
        app: what is behind it.
        keys: one of them must be there.

    Raises:
        ConfigError: a key that a header cannot carry.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._expected = [bearer(key)[1].encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on, or refuse."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        # All are compared, each in constant time, so that the time of a refusal says nothing about any.
        matches = [hmac.compare_digest(given[0], expected) for expected in self._expected] if len(given) == 1 else []
        if any(matches):
            await self._app(scope, receive, send)
            return
        reason = "wrong API key" if given else "the call carries no API key: send it as `Authorization: Bearer KEY`"
        await answer_of(AuthenticationError(reason)).response()(scope, receive, send)
