"""What was chosen for a batch, on its way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from workers.errors import NoTokenLeftError, SamplingError
from workers.host_copies import HostCopy
from workers.messages import TokenLogprob
from workers.sampling.ops.logprob_types import TopLogprobs
from workers.sampling.state import SamplingState


class SampledToken(NamedTuple):
    """A chosen token.

    `logprob` and `top_logprobs` (most likely first) are of the model's own distribution, before penalties, temperature
    and filters. The chosen token need not be among the top ones.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class SampledBatch:
    """Tokens of N rows, and log-probabilities where they are wanted: copied now, waited for in `tokens`.

    Args:
        token_ids: int64 (N,) on the device, -1 where none could be chosen; may be overwritten afterwards.
        logprobs: of the same rows, if any of them wants some.
    """

    def __init__(self, token_ids: torch.Tensor, logprobs: TopLogprobs | None = None) -> None:
        self._logprobs = None if logprobs is None else tuple(HostCopy(tensor) for tensor in logprobs)
        self._token_ids = HostCopy(token_ids)

    def token_ids(self) -> list[int]:
        """The tokens, -1 where none could be chosen; waits for this batch alone."""
        return self._token_ids.tolist()

    def tokens(self, states: Sequence[SamplingState]) -> list[SampledToken | SamplingError]:
        """The tokens of these sequences, an error in the place of each that has none.

        Args:
            states: of the N rows.
        """
        sampled = [
            SampledToken(token_id) if token_id >= 0 else _no_token(state)
            for token_id, state in zip(self.token_ids(), states, strict=True)
        ]
        if self._logprobs is None:
            return sampled
        chosen, top_ids, top_values = (copy.tolist() for copy in self._logprobs)
        for row, (token, state) in enumerate(zip(sampled, states, strict=True)):
            wanted = state.params.logprobs
            if wanted is not None and isinstance(token, SampledToken):
                top = zip(top_ids[row][:wanted], top_values[row][:wanted], strict=True)
                sampled[row] = SampledToken(token.token_id, chosen[row], tuple(TokenLogprob(*pair) for pair in top))
        return sampled


def _no_token(state: SamplingState) -> SamplingError:
    if state.nothing_left is not None:
        return NoTokenLeftError(state.nothing_left)
    return SamplingError(
        "no token can be chosen for the sequence: the model's logits contain NaN or infinity, or every token is masked"
    )
