"""One table: which error becomes which gRPC status."""

from __future__ import annotations

import asyncio
import logging

import grpc

from cluster.errors import (
    AuthenticationError,
    CrashingRequestError,
    ForbiddenError,
    NoWorkersError,
    QueueFullError,
    ShuttingDownError,
    StartingError,
    WorkerLeavesError,
    WorkerLostError,
)
from cluster.server.error_text import error_text
from cluster.wire.retry_after import RETRY_AFTER_KEY
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

STATUS_BY_ERROR: dict[type[BaseException], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NoTokenLeftError: grpc.StatusCode.INVALID_ARGUMENT,
    SamplingError: grpc.StatusCode.FAILED_PRECONDITION,
    CapacityError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    asyncio.CancelledError: grpc.StatusCode.CANCELLED,
    WorkerLostError: grpc.StatusCode.UNAVAILABLE,
    CrashingRequestError: grpc.StatusCode.FAILED_PRECONDITION,
    WorkerLeavesError: grpc.StatusCode.UNAVAILABLE,
    ShuttingDownError: grpc.StatusCode.UNAVAILABLE,
    StartingError: grpc.StatusCode.UNAVAILABLE,
    NoWorkersError: grpc.StatusCode.UNAVAILABLE,
    HandoffError: grpc.StatusCode.UNAVAILABLE,
    RoomLostError: grpc.StatusCode.UNAVAILABLE,
    AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
}
"""A subclass has the status of its nearest base in this table; what is not in it is INTERNAL."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and the message that a client sees for `error`.

    What is not in the table is a defect of the server: it is logged with its traceback, and the client is told no more
    than that it happened.
    """
    for base in type(error).__mro__:
        if base in STATUS_BY_ERROR:
            return STATUS_BY_ERROR[base], error_text(error)
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"


def trailing_metadata_of(error: BaseException) -> tuple[tuple[str, str], ...]:
    """What goes with the status of `error`: when to try again, if that is known."""
    if isinstance(error, QueueFullError):
        return ((RETRY_AFTER_KEY, str(round(error.retry_after_s * 1e3))),)
    return ()
