"""What is added to the logits of a sequence at every step: its biases, and minus infinity where no token may come."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.host_copies import to_device
from workers.sampling.ops.vocabulary_rows import VocabularyRows
from workers.sampling.state import SamplingState


class TokenBias:
    """A row of biases for each sequence that has some.

    Args:
        vocab_size: V, biases in a row.
        device: where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._rows = VocabularyRows(vocab_size, torch.float32, device)

    @property
    def tensor(self) -> torch.Tensor:
        """float32 (slots, V); another tensor after `claim`."""
        return self._rows.tensor

    @torch.inference_mode()
    def claim(self, states: Sequence[SamplingState]) -> list[int]:
        """A slot for each of these, with what their parameters say of single tokens."""
        if not states:
            return []
        slots = self._rows.take(len(states))
        for slot, state in zip(slots, states, strict=True):
            self.tensor[slot].copy_(to_device(self._biases(state), self.tensor.device))
        return slots

    def release(self, slot: int) -> None:
        """Nobody needs the slot from the next step on."""
        self._rows.release(slot)

    def _biases(self, state: SamplingState) -> torch.Tensor:
        """float32 (V,) on the host."""
        params = state.params
        allowed = params.allowed_token_ids
        biases = torch.full((self._vocab_size,), float("-inf") if allowed else 0.0)
        biases[list(allowed)] = 0.0
        biases[[word[0] for word in params.bad_words_token_ids if len(word) == 1]] = float("-inf")
        for token_id, bias in params.logit_bias:
            biases[token_id] += bias
        return biases
