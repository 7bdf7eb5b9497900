"""Endpoints whose body is looked at before it is parsed."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from cluster.server.openai.json_bounds import check_json_bounds


class BoundedRoute(APIRoute):
    """Refuses bodies that have too much of anything; see `check_json_bounds`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_bounded(request: Request) -> Response:
            check_json_bounds(await request.body())
            return await handle(request)

        return handle_bounded
