"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), rotating halves as Hugging Face checkpoints do."""

from __future__ import annotations

import math

import torch

from workers.ops.rope_config import Llama3Scaling, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_size: int) -> torch.Tensor:
    """(D / 2,) float32: how many radians each pair of dimensions turns per position, scaled where `rope` says so."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / (rope.theta**exponents)
    return frequencies if rope.scaling is None else _llama3(frequencies, rope.scaling)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's scaling, from its reference code (meta-llama/llama-models, `apply_scaling`).

    Wavelengths longer than the original context divided by `low_freq_factor` are stretched by `factor`; shorter than
    it divided by `high_freq_factor` are kept; between the two the frequencies are blended linearly.
    """
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    kept = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - kept) * stretched + kept * frequencies
    low = wavelengths > original / scaling.low_freq_factor
    high = wavelengths < original / scaling.high_freq_factor
    return torch.where(low, stretched, torch.where(high, frequencies, blended))


class Rotary:
    """Rotates query and key heads; the angles of a batch are computed once and shared by all layers.

    Angles and their cosines are float32 whatever the model's dtype: a position of a few thousand does not fit bfloat16.
    """

    def __init__(self, rope: RopeConfig, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        half = inverse_frequencies(rope, head_size)
        self._frequencies = torch.cat((half, half)).to(device)
        self._half = head_size // 2
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines with the first half negated, each (T, 1, D) in the model's dtype, of (T,) positions."""
        angles = positions.float()[:, None, None] * self._frequencies
        sines = angles.sin()
        sines[..., : self._half].neg_()
        return angles.cos().to(self._dtype), sines.to(self._dtype)

    def rotate(self, heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(T, H, D) rotated, as a new contiguous tensor. `angles` comes from the method of that name."""
        cosines, sines = angles
        return (heads * cosines).addcmul_(heads.roll(self._half, -1), sines)
