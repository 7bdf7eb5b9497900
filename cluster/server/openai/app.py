"""The application: endpoints, who may call, and how errors are answered."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.config.schema import HttpConfig
from cluster.server.credentials import Credentials
from cluster.server.held_bytes import HeldBytes
from cluster.server.openai.access import BearerTokenMiddleware
from cluster.server.openai.body_limit import BodyLimitMiddleware
from cluster.server.openai.callers import CallerMiddleware
from cluster.server.openai.door import Door
from cluster.server.openai.errors import Answer, Kind, answer_of
from cluster.server.openai.request_id import HEADER
from cluster.server.openai.routes import chat, completions, models, probes, responses, tokens
from cluster.server.openai.validation import validation_answer
from workers.errors import BatonError

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 400: "invalid_json"}


def build_app(config: HttpConfig, door: Door, credentials: Credentials | None = None) -> FastAPI:
    """The ASGI application behind one door; `credentials` are the keys that are good, None: all are."""
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None)
    app.state.door = door
    for routes in (completions, chat, responses, models, tokens, probes):
        app.include_router(routes.router)
    app.add_exception_handler(BatonError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)
    # The one that is added last is the first that a request meets.
    app.add_middleware(BodyLimitMiddleware, max_bytes=int(config.max_body_mb * 1e6), held=HeldBytes())
    if credentials is not None:
        app.add_middleware(BearerTokenMiddleware, credentials=credentials)
    app.add_middleware(CallerMiddleware)
    if config.cors_origins is not None:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, "retry-after"],
        )
    return app


async def _on_error(_request: Request, error: Exception) -> Response:
    return answer_of(error).response()


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_answer(error).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {message.lower()}"
    kind = Kind(error.status_code, "invalid_request_error", _CODES.get(error.status_code))
    return Answer(kind, message, headers=error.headers).response()
