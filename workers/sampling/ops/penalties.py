"""What a sequence's tokens have been to it, for each entry of the vocabulary: on the device, counted up there.

A mark is an int32: `STOP` if the token ends the text, `PROMPT` if the prompt has it (marked only where there is a
repetition penalty, which alone looks at the prompt), and `OUTPUT` for every time that it was generated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.host_copies import to_device
from workers.sampling.ops.row_params import RowParams
from workers.sampling.ops.vocabulary_rows import VocabularyRows
from workers.sampling.state import SamplingState

PROMPT, STOP, OUTPUT = 1, 2, 4


class TokenMarks:
    """A row of marks for each sequence that needs one. Memory is taken when the first one does, and doubled.

    Args:
        vocab_size: V, marks in a row.
        device: where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._rows = VocabularyRows(vocab_size, torch.int32, device)

    @property
    def tensor(self) -> torch.Tensor:
        """int32 (slots, V); another tensor after `claim`."""
        return self._rows.tensor

    @torch.inference_mode()
    def claim(self, states: Sequence[SamplingState]) -> list[int]:
        """A slot for each of these, marked as its tokens so far demand."""
        if not states:
            return []
        slots = self._rows.take(len(states))
        places, marks = zip(*(self._marks(state) for state in states), strict=True)
        rows = np.repeat(slots, [len(ids) for ids in places]).astype(np.int64)
        packed = torch.from_numpy(np.stack([rows * self._vocab_size + np.concatenate(places), np.concatenate(marks)]))
        where, what = to_device(packed, self.tensor.device).unbind(0)
        self.tensor.view(-1).index_add_(0, where, what.int())
        return slots

    def release(self, slot: int) -> None:
        """Nobody needs the slot from the next step on."""
        self._rows.release(slot)

    def _marks(self, state: SamplingState) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and what to add to their marks; a token may occur more than once."""
        prompt = np.flatnonzero(self._occurs(state)) if state.looks_at_prompt else np.empty(0, dtype=np.int64)
        stops = np.asarray([t for t in state.stop_ids if 0 <= t < self._vocab_size], dtype=np.int64)
        output = np.asarray(state.output_token_ids, dtype=np.int64)
        kinds = np.repeat([PROMPT, STOP, OUTPUT], [len(prompt), len(stops), len(output)]).astype(np.int64)
        return np.concatenate([prompt, stops, output]), kinds

    def _occurs(self, state: SamplingState) -> npt.NDArray[np.bool_]:
        """(V,), whether a token is in the prompt."""
        occurs = np.zeros(self._vocab_size, dtype=np.bool_)
        occurs[state.prompt_token_ids] = True
        return occurs


def apply_marks(scores: torch.Tensor, marks: torch.Tensor, params: RowParams, num_output: torch.Tensor) -> torch.Tensor:
    """Mask the tokens that may not come yet, then penalise those that came.

    Before `min_tokens` no token that ends the text may come. Repetition (Keskar et al. 2019, "CTRL", section 4.1, in
    the sign-aware form that is in common use: a positive logit is divided by the penalty, a negative one multiplied),
    then frequency times count and presence (OpenAI API).

    Args:
        scores: float32 (N, V).
        marks: int32 (N, V), of the same rows.
        params: of the same rows.
        num_output: (N,), their output tokens so far.
    """
    banned = (num_output < params.min_tokens).unsqueeze(1) & ((marks & STOP) != 0)
    scores = scores.masked_fill(banned, float("-inf"))
    count = (marks // OUTPUT).float()
    repetition, frequency, presence = (p.unsqueeze(1) for p in (params.repetition, params.frequency, params.presence))
    seen = (marks & ~STOP) != 0
    scores = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
    return scores - frequency * count - presence * (count > 0)
