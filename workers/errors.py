"""What can go wrong in a worker, as types. Each door of the service answers them in its own way."""

from __future__ import annotations


class BatonError(Exception):
    """Base of every error that Baton raises on purpose; its text is fit for a user."""


class InvalidRequestError(BatonError):
    """The request itself is wrong; the text names the value and the limit."""


class CapacityError(BatonError):
    """The request is valid but can never fit this worker (more blocks than it has)."""


class CheckpointError(BatonError):
    """A checkpoint is missing, truncated, or of a kind that Baton does not run."""


class ConfigError(BatonError):
    """A configuration value is wrong; the text names the key and what would be right."""


class CacheTooSmallError(ConfigError):
    """The KV cache cannot hold one sequence of the context window.

    Attributes:
        num_tokens: that it can hold.
    """

    def __init__(self, message: str, num_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens

    def __reduce__(self) -> tuple[type[CacheTooSmallError], tuple[str, int]]:
        return type(self), (str(self), self.num_tokens)


class HandoffError(BatonError):
    """The KV cache did not arrive whole; the request cannot go on."""


class RoomLostError(BatonError):
    """The worker has no room for the request any more: blocks that it would need may still be written to by others."""


class DeadlineExceededError(BatonError):
    """The request's deadline passed."""


class RequestCancelledError(BatonError):
    """The client gave up."""


class SamplingError(BatonError):
    """No token can be chosen from a sequence's logits: NaN, infinity, or every token masked.

    Attributes:
        rows: the rows of the batch that are at fault. Sampling changes nothing, so the caller may fail these
            sequences and sample the others again.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class NoTokenLeftError(SamplingError):
    """What the request itself rules out leaves no token; the model's logits are in order."""
