"""Endpoints whose body is bounded, and read off the event loop where it is large."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.generation.intake import AT_ONCE_BYTES
from cluster.server.connections import BODY_LIMIT_S
from cluster.server.openai.door import served_of
from cluster.server.openai.json_bounds import check_json_bounds
from workers.errors import BatonError, DeadlineExceededError, RequestCancelledError

_T = TypeVar("_T")


class BoundedRoute(APIRoute):
    """Refuses bodies that have too much of anything; see `check_json_bounds`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handle, field = super().get_route_handler(), self.body_field
        if field is None:
            return handle

        async def handle_bounded(request: Request) -> Response:
            try:
                async with asyncio.timeout(BODY_LIMIT_S):
                    body = await request.body()
            except TimeoutError:
                raise DeadlineExceededError(f"the body was not here within {BODY_LIMIT_S:g} s") from None
            except ClientDisconnect:
                raise RequestCancelledError("the client is gone") from None
            large = len(body) > AT_ONCE_BYTES
            try:
                return await handle(_LargeRequest(request, body, field) if large else request)
            except _RefusedError as refused:
                raise refused.error from None

        return handle_bounded


async def off_loop(request: Request, work: Callable[[], _T]) -> _T:
    """Do a part of the work on a request, off the event loop if it is large; see `Intake.run`."""
    return await served_of(request).generation.intake.run(len(await request.body()), work)


class _RefusedError(HTTPException):
    """Carries an error through FastAPI, which would make of any other one that the body cannot be parsed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(400)
        self.error = error


class _LargeRequest(Request):
    """A request whose JSON is what it was asked for already: FastAPI takes a model as it is."""

    def __init__(self, request: Request, body: bytes, field: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = body
        self._field = field

    async def json(self) -> Any:
        """The body as the endpoint's model."""
        try:
            intake = served_of(self).generation.intake
            return await intake.run(len(self._body), self._read)
        except (BatonError, RequestValidationError) as error:
            raise _RefusedError(error) from error

    def _read(self) -> Any:
        check_json_bounds(self._body)
        value = json.loads(self._body)
        read, errors = self._field.validate(value, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors, body=value)
        return read
