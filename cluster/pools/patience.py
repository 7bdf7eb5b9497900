"""How long a worker may take for what it does before it is taken for stuck."""

from __future__ import annotations

from dataclasses import dataclass

from workers.worker_host import WorkerInfo

_STALLED_AFTER_S, _STALLED_MARGIN = 3.0, 4.0
LEAST_START_S = 120.0
_MOST_DOUBLINGS = 4


@dataclass(frozen=True)
class Patience:
    """With what a worker does. Times in seconds.

    Attributes:
        silence_s: a worker that says nothing for so long is lost; None: only one whose output ends.
        step_timeout_s: a step may take so long, whatever was predicted of it.
        start_timeout_s: a start may take so long of whose like nothing is known, once its processes run.
        start_silence_s: a process that starts and does not answer for so long is lost.
        margin: a step and a start may take so many times what is predicted.
    """

    silence_s: float | None = None
    step_timeout_s: float = 120.0
    start_timeout_s: float = 1800.0
    start_silence_s: float = 60.0
    margin: float = 10.0

    def stalled_after_s(self, info: WorkerInfo) -> float:
        """A step that has taken so long keeps requests from its worker until it ends."""
        return min(max(_STALLED_AFTER_S, _STALLED_MARGIN * longest_step_s(info)), self.stuck_after_s(info))

    def stuck_after_s(self, info: WorkerInfo) -> float:
        """A step that has taken so long will not end."""
        return max(self.step_timeout_s, self.margin * longest_step_s(info))

    def start_s(self, predicted_s: float | None, failed: int) -> float:
        """A start may take so long.

        Args:
            predicted_s: that the longest of its like took; None: there was none.
            failed: starts before this one that did not succeed: each doubles it, because the prediction may be wrong.
        """
        if predicted_s is None:
            return self.start_timeout_s
        return max(LEAST_START_S, self.margin * predicted_s) * 2.0 ** min(failed, _MOST_DOUBLINGS)


def longest_step_s(info: WorkerInfo) -> float:
    """What a worker's longest step takes by what it has measured: its most prompt tokens, and its largest batch."""
    times = info.step_times
    tokens = info.num_blocks * info.engine.layout.primary.block_size
    return times.prefill_seconds(info.max_num_batched_tokens) + times.decode_seconds(info.max_num_seqs, tokens)
