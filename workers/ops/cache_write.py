"""Where a fused operation stores keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attention.backend import KVScales


@dataclass(frozen=True)
class CacheWrite:
    """Where one layer's keys and values are stored.

    Attributes:
        kv_cache: (num_blocks, 2, block_size, Hkv, D), or of latents (num_blocks, block_size, latent size); of the
            heads' dtype or float8_e4m3fn; written.
        slot_mapping: (T,) int64, `block * block_size + offset`, all different; a negative one is not stored.
        scales: of an FP8 cache.
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor
    scales: KVScales = field(default_factory=KVScales)
