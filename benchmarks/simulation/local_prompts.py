"""Prompts that a simulated decode worker computes itself, in chunks beside its steps, first come, first served."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.simulation.decode_memory import Sequence
from benchmarks.simulation.hardware import Hardware


class LocalPrompts:
    """The prompts of one worker that are not computed yet.

    Args:
        hardware: what it is made of.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._prompts: dict[str, Sequence] = {}
        self._left: dict[str, tuple[int, float]] = {}  # tokens and seconds

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, sequence: Sequence) -> None:
        """A prompt has come, of which `sequence.cached_tokens` are here."""
        name, tokens = sequence.request.attempt_id, len(sequence.request.prompt_token_ids)
        self._prompts[name] = sequence
        self._left[name] = tokens - sequence.cached_tokens, self._hardware.prompt_s(tokens, sequence.cached_tokens)

    def remove(self, attempt_id: str) -> None:
        """Nobody wants it any more, or it is unknown."""
        self._prompts.pop(attempt_id, None)
        self._left.pop(attempt_id, None)

    def compute(self, has_blocks: Callable[[Sequence], bool]) -> tuple[float, list[Sequence]]:
        """The next chunk: how long it takes, and the sequences whose prompts end with it.

        Args:
            has_blocks: whether a prompt has its blocks; the first one without holds up those behind it.
        """
        budget, seconds, ended = self._hardware.chunk_tokens, 0.0, []
        for name, sequence in list(self._prompts.items()):
            if not budget or not has_blocks(sequence):
                break
            tokens, left_s = self._left[name]
            taken = min(tokens, budget)
            spent_s = left_s * taken / tokens
            budget, seconds = budget - taken, seconds + spent_s
            self._left[name] = tokens - taken, left_s - spent_s
            if taken == tokens:
                self.remove(name)
                ended.append(sequence)
        return seconds, ended
