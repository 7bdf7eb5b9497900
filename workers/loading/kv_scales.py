"""The scales of an FP8 KV cache that a checkpoint brings: one for the keys and one for the values of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from attention.backend import KVScales
from workers.errors import CheckpointError
from workers.loading.checkpoint import read_tensor
from workers.loading.stored_tensor import StoredTensor

_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:(?:attn|[kv]_proj|qkv_proj)\.)?([kv])_scale")

Place = tuple[int, str]
"""A layer's number, and "k" or "v"."""


def kv_scale_place(name: str, num_layers: int) -> Place | None:
    """Which scale a checkpoint's tensor is, by its name; None where it is none.

    Spellings: `self_attn.k_scale` (compressed-tensors), `self_attn.k_proj.k_scale` (ModelOpt; where the
    projections are one tensor `self_attn.qkv_proj.k_scale`) and, with vLLM's name for the layer,
    `self_attn.attn.k_scale`.
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= num_layers:
        return None
    return int(match[1]), match[2]


def read_kv_scales(stored: Mapping[Place, StoredTensor]) -> dict[int, KVScales]:
    """The scales by layer, for the layers that have any.

    Raises:
        CheckpointError: a scale that is no single positive number, or a layer that has one for keys or for values only.
    """
    scales = {}
    for layer in sorted({layer for layer, _ in stored}):
        values = {}
        for kind in ("k", "v"):
            if (layer, kind) not in stored:
                other = next(tensor for (number, _), tensor in stored.items() if number == layer)
                raise CheckpointError(f"{other.file}: layer {layer} has {other.name} but no {kind}_scale")
            values[kind] = _value(stored[layer, kind])
        scales[layer] = KVScales(values["k"], values["v"])
    return scales


def _value(stored: StoredTensor) -> float:
    if math.prod(stored.shape) != 1:
        raise CheckpointError(f"{stored.file}: tensor {stored.name} has shape {stored.shape}, a scale is one number")
    value = float(read_tensor(stored).float().item())
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{stored.file}: tensor {stored.name} is {value}, a scale is positive")
    return value
