"""The first tokens of a prefill step: chosen on the device, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.errors import SamplingError
from workers.sampling.results import SampledToken
from workers.sampling.sampler import launch_sample
from workers.sampling.state import SamplingState


class FirstTokens:
    """One token for each prompt that a step completes. Nothing that is queued later delays them.

    Args:
        logits: float32 (N, V), after each prompt's last token.
        states: of the N prompts; left as they are.
        computed: after everything that the step has queued on a GPU; None where nothing is queued.
    """

    def __init__(
        self, logits: torch.Tensor, states: Sequence[SamplingState], computed: torch.cuda.Event | None
    ) -> None:
        self._states, self._computed = states, computed
        self._sampled = launch_sample(logits, states) if states else None

    def wait(self) -> list[SampledToken | SamplingError]:
        """The tokens, once the step is done; an error in the place of each prompt that has no valid one."""
        if self._sampled is not None:
            return self._sampled.tokens(self._states)
        if self._computed is not None:
            self._computed.synchronize()
        return []
