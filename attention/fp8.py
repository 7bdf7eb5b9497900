"""FP8 (e4m3) KV cache: storing with a scale, reading it again, and finding the scales."""

from __future__ import annotations

import torch

from attention.backend import KVScales
from attention.spec import FP8

FP8_MAX = 448.0
"""Largest finite e4m3 number."""


def quantize(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """`tensor / scale` as e4m3, clamped to its range: what is beyond it becomes the largest number, not NaN.

    The division is exact on every device, so that all backends store the same bytes.
    """
    # By a number, PyTorch would multiply with the reciprocal on a GPU.
    divisor = torch.full((), scale, dtype=torch.float32, device=tensor.device)
    return (tensor.float() / divisor).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def dequantize(stored: torch.Tensor, scale: float) -> torch.Tensor:
    """What `quantize` stored, as float32."""
    return stored.float().mul_(scale)


def calibrate(key: torch.Tensor, value: torch.Tensor) -> KVScales:
    """Scales that bring the largest of these keys and of these values to the edge of e4m3's range.

    Waits for the device. Scales stay fixed once anything was stored with them: calibrate on a layer's first tokens, or
    give the scales that a checkpoint brings.

    Args:
        key: (T, Hkv, D).
        value: (T, Hkv, D).
    """
    largest = torch.stack((key.abs().amax(), value.abs().amax())).float().tolist()
    k, v = (biggest / FP8_MAX if 0 < biggest < float("inf") else 1.0 for biggest in largest)
    return KVScales(k, v)
