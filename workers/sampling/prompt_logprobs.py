"""Log-probabilities of prompts: chunk by chunk, in rows that bound the memory of their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from workers.host_copies import HostCopy, to_device
from workers.messages import PromptLogprobs, WorkerRequest
from workers.sampling.ops.row_params import LOGPROBS, WORDS
from workers.sampling.ops.top_logprobs import top_logprobs
from workers.token_ids import TokenIds

LOGITS_AT_ONCE = 2**24
"""Elements of the logits that are there at once: 64 MiB of float32, 128 rows of a vocabulary of 131,072."""


@dataclass(eq=False)
class PromptScores:
    """What is known of a prompt's log-probabilities so far.

    Attributes:
        num_top: most likely tokens that are wanted at each place.
        parts: of the chunks that are computed, in order: logprobs, top token ids, top logprobs.
    """

    num_top: int
    parts: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]] = field(
        default_factory=list
    )

    @classmethod
    def of(cls, request: WorkerRequest) -> PromptScores | None:
        """Of a prompt that has just come; None: the request does not ask."""
        num_top = request.sampling.prompt_logprobs
        return None if num_top is None else cls(num_top)

    def event(self, request: WorkerRequest) -> PromptLogprobs:
        """All of them, once the prompt is computed."""
        none = np.zeros((0, self.num_top), dtype=np.float32)  # a prompt of one token has no parts
        return PromptLogprobs(
            request.request_id,
            np.concatenate([none[:, 0] if self.num_top else none.reshape(0), *(part[0] for part in self.parts)]),
            np.concatenate([none.astype(np.int32), *(part[1].astype(np.int32) for part in self.parts)]),
            np.concatenate([none, *(part[2] for part in self.parts)]),
            attempt_id=request.attempt_id,
        )


@dataclass(frozen=True)
class _Wanted:
    """Rows of a step's hidden states, the tokens that follow them, and whose they are."""

    scores: PromptScores
    rows: slice
    targets: TokenIds


class ScoredRows:
    """Those tokens of a step whose log-probabilities are asked for."""

    def __init__(self) -> None:
        self._wanted: list[_Wanted] = []
        self._copies: list[tuple[PromptScores, Sequence[HostCopy]]] = []

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def add(self, scores: PromptScores, first_row: int, targets: TokenIds) -> None:
        """From a row on, the log-probability of each of these tokens given what comes before it."""
        if len(targets):
            self._wanted.append(_Wanted(scores, slice(first_row, first_row + len(targets)), targets))

    @torch.inference_mode()
    def launch(
        self, hidden: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
    ) -> None:
        """Queue the computation and its way to the host; nobody waits.

        Args:
            hidden: (T, hidden size), what the model has made of the step's tokens.
            compute_logits: of the model, (N, hidden size) to (N, V) float32.
            vocab_size: V.
        """
        most_rows = max(1, LOGITS_AT_ONCE // vocab_size)
        for wanted in self._wanted:
            states = hidden[wanted.rows]
            targets = to_device(torch.from_numpy(wanted.targets.astype(np.int64)), hidden.device)
            for start in range(0, len(states), most_rows):
                part = targets[start : start + most_rows]
                words = torch.zeros(len(part), WORDS, dtype=torch.int32, device=hidden.device)
                words[:, LOGPROBS] = wanted.scores.num_top
                logits = compute_logits(states[start : start + most_rows])
                found = top_logprobs(logits, words, part, min(wanted.scores.num_top, vocab_size))
                self._copies.append((wanted.scores, [HostCopy(tensor) for tensor in found]))

    def wait(self) -> None:
        """Enter what was computed."""
        for scores, copies in self._copies:
            logprobs, token_ids, values = (copy.numpy() for copy in copies)
            scores.parts.append((logprobs, token_ids, values))
