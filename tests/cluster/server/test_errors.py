import asyncio
import logging

import grpc
import pytest

from cluster.errors import (
    AuthenticationError,
    NoWorkersError,
    QueueFullError,
    WorkerLostError,
)
from cluster.server.grpc.errors import status_of
from workers.errors import (
    BatonError,
    CapacityError,
    CheckpointError,
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    RequestCancelledError,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (CapacityError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (QueueFullError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlineExceededError("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (RequestCancelledError("x"), grpc.StatusCode.CANCELLED),
        (WorkerLostError("x"), grpc.StatusCode.UNAVAILABLE),
        (NoWorkersError("x"), grpc.StatusCode.UNAVAILABLE),
        (HandoffError("x"), grpc.StatusCode.UNAVAILABLE),
        (AuthenticationError("x"), grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_each_error_has_its_status_and_keeps_its_message(error: BatonError, status: grpc.StatusCode) -> None:
    assert status_of(error) == (status, "x")


def test_a_subclass_has_the_status_of_its_base() -> None:
    class ConverterError(HandoffError):
        pass

    assert status_of(ConverterError("layouts differ")) == (grpc.StatusCode.UNAVAILABLE, "layouts differ")


def test_cancellation_without_text_is_named() -> None:
    assert status_of(asyncio.CancelledError()) == (grpc.StatusCode.CANCELLED, "CancelledError")


@pytest.mark.parametrize("error", [KeyError("/secret/path"), RuntimeError("secret"), CheckpointError("secret")])
def test_the_unexpected_is_logged_and_not_told(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, message = status_of(error)
    assert status is grpc.StatusCode.INTERNAL
    assert "secret" not in message
    assert "secret" in caplog.text
