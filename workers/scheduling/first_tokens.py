"""The first tokens of a prefill step: chosen on the device, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.errors import SamplingError
from workers.host_copies import to_device
from workers.sampling.results import SampledBatch, SampledToken
from workers.sampling.sampler import launch_sample
from workers.sampling.state import SamplingState


class FirstTokens:
    """Of each prompt that a step completes, one token for each of its samples. Nothing queued later delays them.

    Args:
        logits: float32 (N, V), after each prompt's last token.
        states: of the samples of each of the N prompts; left as they are.
        computed: after everything that the step has queued on a GPU; None where nothing is queued.
    """

    def __init__(
        self, logits: torch.Tensor, states: Sequence[Sequence[SamplingState]], computed: torch.cuda.Event | None
    ) -> None:
        self._states, self._computed = states, computed
        single = [row for row, own in enumerate(states) if len(own) == 1]
        self._single = _launch(logits, single, [states[row][0] for row in single])
        # One by one, so that many prompts of many samples do not have all of their rows in memory at once.
        self._several = {
            row: launch_sample(logits[row : row + 1].expand(len(own), -1).contiguous(), own)
            for row, own in enumerate(states)
            if len(own) > 1
        }

    def wait(self) -> list[list[SampledToken] | SamplingError]:
        """The tokens of each prompt's samples, once the step is done; an error in the place of a prompt without any."""
        if not self._states and self._computed is not None:
            self._computed.synchronize()
        single = [own[0] for own in self._states if len(own) == 1]
        alone = iter([] if self._single is None else self._single.tokens(single))
        return [
            _all_of([next(alone)] if len(own) == 1 else self._several[row].tokens(own))
            for row, own in enumerate(self._states)
        ]


def _launch(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> SampledBatch | None:
    """Choose a token for each of these rows."""
    if not rows:
        return None
    if len(rows) < len(logits):
        logits = logits.index_select(0, to_device(torch.tensor(rows), logits.device))
    return launch_sample(logits, states)


def _all_of(sampled: Sequence[SampledToken | SamplingError]) -> list[SampledToken] | SamplingError:
    """The tokens of a prompt's samples, or why one of them has none: then the prompt has no valid logits."""
    tokens: list[SampledToken] = []
    for token in sampled:
        if isinstance(token, SamplingError):
            return token
        tokens.append(token)
    return tokens
