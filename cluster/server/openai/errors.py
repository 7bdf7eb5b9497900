"""One table: which error becomes which HTTP status, and OpenAI's JSON for it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from cluster.errors import (
    AuthenticationError,
    CrashingRequestError,
    ForbiddenError,
    ModelNotFoundError,
    NoWorkersError,
    QueueFullError,
    ShuttingDownError,
    StartingError,
    WorkerLeavesError,
    WorkerLostError,
)
from cluster.server.error_text import error_text
from cluster.server.openai.json_bytes import json_bytes
from workers.errors import (
    CapacityError,
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    NoTokenLeftError,
    RequestCancelledError,
    RoomLostError,
    SamplingError,
)

logger = logging.getLogger(__name__)


class UnsupportedFieldError(InvalidRequestError):
    """The request has a field, or a value of one, that this server does not know how to honour.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Kind:
    """How an error looks: the HTTP status, and `type` and `code` of OpenAI's error object."""

    status: int
    type: str
    code: str | None = None


_INVALID = "invalid_request_error"
_UNAVAILABLE = Kind(503, "server_error", "service_unavailable")
KIND_BY_ERROR: dict[type[BaseException], Kind] = {
    InvalidRequestError: Kind(400, _INVALID),
    UnsupportedFieldError: Kind(400, _INVALID, "unsupported_parameter"),
    NoTokenLeftError: Kind(400, _INVALID),
    SamplingError: Kind(422, _INVALID, "no_valid_logits"),
    CapacityError: Kind(400, _INVALID),
    AuthenticationError: Kind(401, _INVALID, "invalid_api_key"),
    ForbiddenError: Kind(403, _INVALID, "insufficient_permissions"),
    ModelNotFoundError: Kind(404, _INVALID, "model_not_found"),
    DeadlineExceededError: Kind(408, "timeout_error", "deadline_exceeded"),
    QueueFullError: Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    RequestCancelledError: Kind(499, _INVALID, "request_cancelled"),
    asyncio.CancelledError: Kind(499, _INVALID, "request_cancelled"),
    CrashingRequestError: Kind(422, _INVALID, "request_crashes_workers"),
    WorkerLostError: _UNAVAILABLE,
    WorkerLeavesError: _UNAVAILABLE,
    ShuttingDownError: _UNAVAILABLE,
    StartingError: _UNAVAILABLE,
    NoWorkersError: _UNAVAILABLE,
    HandoffError: _UNAVAILABLE,
    RoomLostError: _UNAVAILABLE,
}
"""A subclass is as its nearest base in this table; what is not in it is 500."""
INTERNAL = Kind(500, "server_error", "internal_error")
_SOON_S = 1.0


@dataclass(frozen=True)
class Answer:
    """An error as a client sees it."""

    kind: Kind
    message: str
    param: str | None = None
    headers: Mapping[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.kind.type, "param": self.param, "code": self.kind.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole answer."""
        headers = dict(self.headers or {})
        return Response(json_bytes(self.body()), self.kind.status, headers, media_type="application/json")


def answer_of(error: BaseException) -> Answer:
    """What a client is told of `error`.

    What is not in the table is a defect of the server: it is logged with its traceback, and the client is told no more
    than that it happened.
    """
    for base in type(error).__mro__:
        if base in KIND_BY_ERROR:
            param = error.field if isinstance(error, UnsupportedFieldError) else None
            return Answer(KIND_BY_ERROR[base], error_text(error), param, _headers(error))
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return Answer(INTERNAL, "internal error; the server's log has the details")


def _headers(error: BaseException) -> dict[str, str]:
    """When to come again, where that helps; who must say who he is."""
    if isinstance(error, AuthenticationError) and not isinstance(error, ForbiddenError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, QueueFullError):
        return _retry_after(error.retry_after_s)
    if isinstance(error, StartingError | NoWorkersError | ShuttingDownError):
        return _retry_after(_SOON_S)
    return {}


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds for all clients, milliseconds for those of OpenAI."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, round(seconds * 1e3)))}
