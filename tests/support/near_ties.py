"""Whether a run's tokens are right, or wrong by no more than rounding explains.

Two runs of one model in bf16 may choose different tokens where two candidates are closer to each other than the
rounding of activations moves them. So every token is held against a float32 model that is given the same tokens before
it: its score there must be the best, or nearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from workers.sampling_params import SamplingParams

NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""How far below the best a chosen token's score may lie, by the engine's dtype, in standard deviations of the logits.

bf16 has 8 significant bits; through a few layers the logits of the models here move by 1 to 3 % of their standard
deviation (see `logit_error`), the largest of some thousands by four times that, and the gap of two candidates by twice.
The best token leads the second by 0.3 on average, a token at random by more than 3. Measured on an H200: at most 0.11.
"""


class Float32Reference:
    """`transformers` in float32, with weights rounded as the engine rounds them.

    Args:
        folder: the checkpoint.
        dtype: of the engine's weights.
        device: where it computes.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self._model = model.float().to(device).eval()
        self._device = device

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], first: int) -> torch.Tensor:
        """(n, vocab) float32, of what follows each token from number `first` on."""
        ids = torch.tensor([list(tokens)], device=self._device)
        logits: torch.Tensor = self._model(ids).logits[0, first:].float()
        return logits

    def gaps(self, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams) -> torch.Tensor:
        """(len(output),): how far each token's score lies below the best, 0 where it is the best; see `NEAR_TIE`.

        A score is the logit; of a request that samples (at a temperature alone), the noise of its seed is added.
        """
        logits = self.logits([*prompt, *output[:-1]], len(prompt) - 1)
        scores, spread = logits, logits.std(dim=-1)
        if not sampling.greedy:
            assert sampling.seed is not None
            assert (sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0)
            noise = gumbel_noise(sampling.seed, *logits.shape).to(logits)
            scores, spread = logits / sampling.temperature + noise, spread / sampling.temperature
        chosen = torch.tensor(output, device=logits.device).unsqueeze(1)
        gaps: torch.Tensor = (scores.amax(dim=-1) - scores.gather(1, chosen).squeeze(1)) / spread
        return gaps.cpu()


def gumbel_noise(seed: int, num_tokens: int, vocab_size: int) -> torch.Tensor:
    """(num_tokens, vocab_size) float64: the noise of a request's output tokens, by SplitMix64 and -ln(-ln(1 - u))."""
    gamma, first, second = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

    def mixed(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * first
        x = (x ^ (x >> np.uint64(27))) * second
        return x ^ (x >> np.uint64(31))

    stream = mixed(np.array([seed], dtype=np.uint64) + gamma)
    keys = mixed(stream + (np.arange(num_tokens, dtype=np.uint64) + np.uint64(1)) * gamma)
    bits = mixed(keys[:, None] + np.arange(1, vocab_size + 1, dtype=np.uint64) * gamma) >> np.uint64(11)
    uniform = np.minimum((bits.astype(np.float64) + 0.5) * 2.0**-53, 1 - 2.0**-24)
    return torch.from_numpy(-np.log(-np.log1p(-uniform)))


def logit_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of what differs, in standard deviations of the expected logits."""
    found, expected = found.float(), expected.float()
    return float((found - expected).square().mean().sqrt() / expected.std())
