"""The frequencies of each kind of rotary position embedding, number for number as `transformers` computes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from workers.ops.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    YarnScaling,
)


def inverse_frequencies(rope: RopeConfig, head_size: int, max_model_len: int | None = None) -> torch.Tensor:
    """How many radians each pair of rotated dimensions turns per position.

    Args:
        rope: the kind, and its numbers.
        head_size: D.
        max_model_len: tokens of the longest sequence that is served, which dynamic scaling and LongRoPE depend on;
            None: no longer than the model's original context.

    Returns:
        (rope.rotary_dim(D) / 2,) float32.
    """
    rotary_dim, scaling = rope.rotary_dim(head_size), rope.scaling
    match scaling:
        case None:
            return 1.0 / _powers(rope.theta, rotary_dim)
        case LinearScaling():
            return 1.0 / _powers(rope.theta, rotary_dim) / scaling.factor
        case DynamicScaling():
            return 1.0 / _powers(_dynamic_theta(rope.theta, scaling, rotary_dim, max_model_len), rotary_dim)
        case YarnScaling():
            return _yarn(rope.theta, scaling, rotary_dim)
        case LongRopeScaling():
            long = max_model_len is not None and max_model_len > scaling.original_max_position_embeddings
            factors = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float32)
            return 1.0 / (factors * _powers(rope.theta, rotary_dim))
        case Llama3Scaling():
            return _llama3(1.0 / _powers(rope.theta, rotary_dim), scaling)
        case ProportionalScaling():
            num_pairs = int(rope.partial_rotary_factor * head_size // 2)
            rotated = 1.0 / _powers(rope.theta, head_size, num_pairs)
            return torch.cat((rotated, torch.zeros(head_size // 2 - num_pairs))) / scaling.factor


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied with, so that logits of a longer context are as sharp.

    YaRN: 0.1 ln(factor) + 1, or DeepSeek's quotient of two such where both `mscale` are stated. LongRoPE:
    sqrt(1 + ln(factor) / ln(original context)). Otherwise 1.
    """
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, YarnScaling):
        if scaling.mscale and scaling.mscale_all_dim:
            return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
        return _mscale(scaling.factor, 1.0)
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))


def softmax_scale_factor(rope: RopeConfig) -> float:
    """What DeepSeek multiplies the softmax scale with: the square of YaRN's factor with `mscale_all_dim`; otherwise 1.

    From the reference code (deepseek-ai/DeepSeek-V3, `inference/model.py`). There the whole head is scaled by it, also
    the part that is not rotated, which `attention_factor` cannot reach.
    """
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _powers(theta: float, rotary_dim: int, num_pairs: int | None = None) -> torch.Tensor:
    """theta^(2i / rotary_dim) of the first pairs, None: of all. How many are computed at once may change a last bit."""
    end = rotary_dim if num_pairs is None else 2 * num_pairs
    powers: torch.Tensor = theta ** (torch.arange(0, end, 2, dtype=torch.float32) / rotary_dim)
    return powers


def _dynamic_theta(theta: float, scaling: DynamicScaling, rotary_dim: int, max_model_len: int | None) -> float:
    """The base for sequences of `max_model_len`; see `DynamicScaling` for why of these."""
    length = max(max_model_len or 0, scaling.max_position_embeddings)
    stretch = scaling.factor * length / scaling.max_position_embeddings - (scaling.factor - 1)
    grown: float = theta * stretch ** (rotary_dim / (rotary_dim - 2))
    return grown


def _yarn(theta: float, scaling: YarnScaling, rotary_dim: int) -> torch.Tensor:
    """NTK-by-parts (section 3.2 of the paper): interpolated and kept frequencies, blended by how often each turns."""

    def dimension_turning(times: float) -> float:
        turns = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(theta))

    def rounded(value: float, how: Callable[[float], int]) -> float:
        return how(value) if scaling.truncate else value

    low = max(rounded(dimension_turning(scaling.beta_fast), math.floor), 0)
    high = min(rounded(dimension_turning(scaling.beta_slow), math.ceil), rotary_dim - 1)
    if low == high:
        high += 0.001  # a step, and no division by zero
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    powers = _powers(theta, rotary_dim)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's scaling, from its reference code (meta-llama/llama-models, `apply_scaling`).

    Wavelengths longer than the original context divided by `low_freq_factor` are stretched by `factor`; shorter than
    it divided by `high_freq_factor` are kept; between the two the frequencies are blended linearly. Where the
    two factors are one number, as in Llama 4 Scout, there is nothing between.
    """
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low_factor, high_factor = scaling.low_freq_factor, scaling.high_freq_factor
    span = high_factor - low_factor
    kept = (original / wavelengths - low_factor) / span if span else torch.ones_like(wavelengths)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    low = wavelengths > original / low_factor
    high = wavelengths < original / high_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))
