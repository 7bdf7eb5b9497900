"""What can go wrong in a service, as types, beside those of a worker. Every door answers them in its own way."""

from __future__ import annotations

from workers.errors import BatonError, InvalidRequestError


class QueueFullError(BatonError):
    """There is no room, and waiting is no use; the request was not accepted.

    Args:
        message: for the user.
        retry_after_s: seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorkersError(BatonError):
    """A pool has no worker that could serve the request."""


class ShuttingDownError(BatonError):
    """The service takes no new requests, because it stops; another instance may."""


class StartingError(BatonError):
    """The service takes no requests yet. Takes what its start is at."""

    def __init__(self, step: str) -> None:
        super().__init__(f"the service is starting: {step}")


class WorkerLostError(BatonError):
    """A worker's process ended while it held the request."""


class WorkerSilentError(WorkerLostError):
    """Nothing was heard of a worker for too long; what it held is taken for lost."""


class WorkerStuckError(WorkerLostError):
    """A worker lives and does not get on: its step, or its start, takes far longer than it should."""


class LostToAnotherError(WorkerLostError):
    """A worker was lost while it held the request, through another request: this attempt does not count."""


class CrashingRequestError(BatonError):
    """The request crashes workers: it has done so twice, and is not tried again."""


class WorkerLeavesError(BatonError):
    """A worker is to leave before it has finished the request: others go on with it, and no client sees this."""


class ServiceBrokenError(BatonError):
    """Something that the whole service stands on is gone: it has ended."""


class ModelNotFoundError(InvalidRequestError):
    """The request names another model than the one that is served."""


class AuthenticationError(BatonError):
    """The call carries no bearer token, or a wrong one."""


class ForbiddenError(AuthenticationError):
    """The call's bearer token is good for other calls than this."""
