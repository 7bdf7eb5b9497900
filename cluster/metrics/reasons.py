"""What went wrong, in few words: labels must be of a small number."""

from __future__ import annotations

from cluster.errors import WorkerLeavesError, WorkerLostError
from workers.errors import BatonError, HandoffError, RoomLostError

_HANDOFF_REASONS = (
    ("was not handed over within", "timeout"),
    ("is gone", "peer_lost"),
    ("is made anew", "reconnected"),
    ("cancelled", "cancelled"),
    ("a transfer to", "transfer_failed"),
    ("pushing to", "transfer_failed"),
    ("granted", "wrong_grant"),
    ("another reservation", "wrong_grant"),
    ("a rank", "rank_failed"),
    ("the ranks", "rank_failed"),
    ("deadline", "deadline"),
)
"""Parts of the texts of `kv_transfer.handoff` and `workers.handoff`, in order."""


def failure_reason(error: BaseException) -> str:
    """One of a few words for why an attempt or its handoff ended: docs/metrics.md lists them."""
    if isinstance(error, WorkerLostError):
        return "worker_lost"
    if isinstance(error, WorkerLeavesError):
        return "worker_left"
    if isinstance(error, RoomLostError):
        return "no_room"
    if isinstance(error, HandoffError):
        return next((reason for part, reason in _HANDOFF_REASONS if part in str(error)), "peer_error")
    return error_name(error)


def error_name(error: BaseException) -> str:
    """An error's type; what is no `BatonError` is "internal"."""
    return type(error).__name__.removesuffix("Error") if isinstance(error, BatonError) else "internal"


def worker_name(engine_id: str) -> str:
    """Of an engine id ("prefill-0.3f…", new with every start) the place that it holds."""
    return engine_id.partition(".")[0]
