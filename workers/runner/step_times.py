"""What a worker can do, as it has measured it at start: what the router reckons with."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds.

    A decode step reads the weights once for the whole batch and each sequence's keys and values, so that it takes
    f(sequences) + kv_token_s · tokens: bound by memory bandwidth, as in Pope et al., "Efficiently Scaling Transformer
    Inference" (arXiv:2211.05102, section 2).

    Attributes:
        prefill: (prompt tokens, seconds) for one prompt, by length.
        decode: (sequences, seconds) for one step, by batch size, of sequences that have hardly any tokens.
        kv_token_s: what each token that such a step's sequences have in the cache adds to it.
    """

    prefill: tuple[tuple[int, float], ...] = ()
    decode: tuple[tuple[int, float], ...] = ()
    kv_token_s: float = 0.0

    def prefill_seconds(self, num_tokens: int) -> float:
        """How long a prompt takes, interpolated; 0 when nothing was measured."""
        return _interpolate(self.prefill, num_tokens)

    def rest_seconds(self, num_tokens: int, cached: int) -> float:
        """How long what is left of a prompt takes of which so much is there; no less than a prompt of that length."""
        if not cached:
            return self.prefill_seconds(num_tokens)
        rest = self.prefill_seconds(num_tokens) - self.prefill_seconds(cached)
        return max(rest, self.prefill_seconds(num_tokens - cached))

    def decode_seconds(self, batch_size: int, kv_tokens: float = 0.0) -> float:
        """How long a decode step takes, with so many tokens in the cache; 0 when nothing was measured."""
        return _interpolate(self.decode, batch_size) + self.kv_token_s * kv_tokens


def _interpolate(points: tuple[tuple[int, float], ...], size: int) -> float:
    """On the line through the two nearest points; beyond the last, in proportion to it."""
    if not points:
        return 0.0
    place = bisect_left(points, (size, 0.0))
    if place == len(points):
        return points[-1][1] * size / points[-1][0]
    if place == 0:
        return points[0][1]
    (low, low_s), (high, high_s) = points[place - 1], points[place]
    return low_s + (high_s - low_s) * (size - low) / (high - low)
