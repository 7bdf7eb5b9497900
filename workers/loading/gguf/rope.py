"""How a GGUF file scales the rotary position embedding, as a config.json says it."""

from __future__ import annotations

import os
import struct
from typing import Any

from workers.loading.config_reader import ConfigReader
from workers.loading.gguf.header import GgufHeader

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3.1's scaling comes as what each pair's frequency is divided by."""


def read_theta(read: ConfigReader, key: str, default: float) -> float:
    """The base of the frequencies."""
    return read.positive_float(key, default)


def read_rope_scaling(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any] | None:
    """What `rope_parameters` would hold of the scaling; None: there is none.

    Raises:
        CheckpointError: a kind that is not supported, or a value out of range; names file and key.
    """
    key = f"{prefix}.rope.scaling"
    kind = read.get(f"{key}.type")
    legacy = read.get(f"{prefix}.rope.scale_linear")
    if kind in (None, "none", "linear"):
        factors = _factors(read, header)
        factor_key = f"{key}.factor" if read.get(f"{key}.factor") else f"{prefix}.rope.scale_linear"
        is_linear = kind == "linear" or (kind is None and legacy)
        factor = read.positive_float(factor_key, 1.0) if is_linear else 1.0
        if factors is not None:
            if factor != 1:
                raise read.error(factor_key, f"{factor:g} beside {ROPE_FACTORS} is not supported")
            return _by_frequency(factors, read.positive_int(f"{prefix}.context_length"))
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise read.error(f"{key}.type", f"{kind!r} is not supported, only 'none', 'linear' and 'yarn'")
    scaling = {
        "rope_type": "yarn",
        "factor": read.positive_float(f"{key}.factor"),
        "original_max_position_embeddings": read.positive_int(f"{key}.original_context_length"),
        "beta_fast": read.positive_float(f"{key}.yarn_beta_fast", 32.0),
        "beta_slow": read.positive_float(f"{key}.yarn_beta_slow", 1.0),
    }
    if read.get(f"{key}.attn_factor"):
        raise read.error(f"{key}.attn_factor", f"{read.get(f'{key}.attn_factor')!r} is not supported for yarn")
    return scaling


def _by_frequency(factors: list[float], context: int) -> dict[str, Any]:
    """LongRoPE with the same factors for any length divides frequencies and does nothing else."""
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _factors(read: ConfigReader, header: GgufHeader) -> list[float] | None:
    stored = header.tensors.get(ROPE_FACTORS)
    if stored is None:
        return None
    if stored.dtype != "F32" or len(stored.shape) != 1:
        raise read.error(ROPE_FACTORS, f"is {stored.dtype} of shape {stored.shape}, expected a row of F32")
    with stored.file.open("rb") as opened:
        raw = os.pread(opened.fileno(), stored.nbytes, stored.offset)
    if len(raw) != stored.nbytes:
        raise read.error(ROPE_FACTORS, "cannot be read: the file ends before it does")
    return list(struct.unpack(f"<{stored.shape[0]}f", raw))
