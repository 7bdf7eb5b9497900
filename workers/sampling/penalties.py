"""Presence, frequency and repetition penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.sampling.params import SamplingParams


class TokenHistory:
    """The distinct tokens of a sequence and how often each was generated.

    Attributes:
        token_ids: int64 (U,), distinct tokens of prompt and output, in no particular order.
        output_counts: int64 (U,), how often each occurs in the output.
    """

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._prompt = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._start()

    def _start(self) -> None:
        self.token_ids: npt.NDArray[np.int64] = self._prompt
        self.output_counts: npt.NDArray[np.int64] = np.zeros(len(self._prompt), dtype=np.int64)
        self._index: dict[int, int] = {int(token): i for i, token in enumerate(self._prompt)}
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Count the tokens that were appended since the last call; start again if some were taken back."""
        if len(output_token_ids) < self._num_counted:
            self._start()
        for token in output_token_ids[self._num_counted :]:
            index = self._index.get(token)
            if index is None:
                self._index[token] = len(self.token_ids)
                self.token_ids = np.append(self.token_ids, np.int64(token))
                self.output_counts = np.append(self.output_counts, np.int64(1))
            else:
                self.output_counts[index] += 1
        self._num_counted = len(output_token_ids)


def apply_penalties(
    logits: torch.Tensor, rows: Sequence[int], params: Sequence[SamplingParams], histories: Sequence[TokenHistory]
) -> None:
    """Penalise, in place, the tokens that the sequences at `rows` have seen.

    Repetition first (Keskar et al. 2019, "CTRL", section 4.1, in the sign-aware form that is in common use: a
    positive logit is divided by the penalty, a negative one multiplied), then frequency times count and presence
    (OpenAI API). Only tokens that occur are touched, so the cost follows the histories and not the vocabulary.

    Args:
        logits: float32 (N, V), changed in place.
        rows: R rows of `logits`.
        params: their R parameters.
        histories: their R histories; prompt tokens are needed only where there is a repetition penalty.
    """
    device = logits.device
    lengths = [len(history.token_ids) for history in histories]
    if sum(lengths) == 0:
        return
    token_ids = torch.from_numpy(np.concatenate([history.token_ids for history in histories])).to(device)
    counts = torch.from_numpy(np.concatenate([history.output_counts for history in histories])).to(device)

    repeats = torch.tensor(lengths, device=device)
    coefficients = torch.tensor(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params],
        dtype=torch.float32,
        device=device,
    )
    repetition, frequency, presence = coefficients.repeat_interleave(repeats, dim=0).unbind(dim=1)
    row_ids = torch.tensor(rows, device=device).repeat_interleave(repeats)

    seen = logits[row_ids, token_ids]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen = seen - frequency * counts - presence * (counts > 0)
    logits[row_ids, token_ids] = seen  # (row, token) pairs are distinct
