"""The tensors of a GGUF file by the names that checkpoints in Hugging Face format have for them, and in their form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from workers.errors import CheckpointError
from workers.loading.gguf.architectures import architecture_of
from workers.loading.gguf.header import read_header
from workers.loading.gguf.rope import ROPE_FACTORS
from workers.loading.gguf.storage import GgufBlocks, OneAdded, is_dequantized
from workers.loading.pieces import FLOATS
from workers.loading.stored_tensor import Region, StoredTensor
from workers.loading.weight_target import QuantizedSource, WeightTarget

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)|(\w+)\.(weight|bias)")
_PERMUTED = re.compile(r".*\.self_attn\.([qk])_proj\.(?:weight|bias)")


def gguf_tensors(file: Path) -> list[StoredTensor]:
    """Every tensor of the model in a file, in the order in which they lie there.

    Raises:
        CheckpointError: as `read_header`, or the architecture is not supported, a tensor none of its, or stored in a
            way that is not read; names the file and the tensor.
    """
    header = read_header(file)
    norms = architecture_of(header).norms
    tensors = []
    for stored in header.tensors.values():
        if stored.name == ROPE_FACTORS:
            continue  # read with the config
        name = _name(stored.name, {**_IN_LAYER, **norms})
        if name is None:
            raise CheckpointError(f"{file}: tensor {stored.name} is none that a model of this architecture has")
        if stored.dtype not in FLOATS and not is_dequantized(stored.dtype):
            raise CheckpointError(f"{file}: tensor {stored.name} is stored as {stored.dtype}, which is not read")
        tensors.append(replace(stored, name=name))
    return sorted(tensors, key=lambda tensor: tensor.offset)


def gguf_form(file: Path) -> Callable[[str, WeightTarget], WeightTarget]:
    """What changes a target of a tensor, by its name, to one of the tensor as this file has it."""
    header = read_header(file)
    architecture = architecture_of(header)
    heads = architecture.permuted_heads(header) if architecture.is_permuted else {}
    dtypes = {stored.name: stored.dtype for stored in gguf_tensors(file)}
    return partial(_in_form, dtypes, heads, architecture.has_one_added)


def _name(theirs: str, in_layer: Mapping[str, str]) -> str | None:
    match = _NAME.fullmatch(theirs)
    if match is None:
        return None
    layer, part, kind, outside, outside_kind = match.groups()
    if layer is None:
        return f"{_OUTSIDE[outside]}.{outside_kind}" if outside in _OUTSIDE else None
    return f"model.layers.{layer}.{in_layer[part]}.{kind}" if part in in_layer else None


def _in_form(
    dtypes: Mapping[str, str], heads: Mapping[str, int], has_one_added: bool, name: str, target: WeightTarget
) -> WeightTarget:
    dtype = dtypes.get(name)
    if dtype is None:
        return target
    if dtype not in FLOATS:
        target = replace(target, quantized=QuantizedSource(GgufBlocks(dtype)))
    elif has_one_added and name.endswith("norm.weight"):
        target = replace(target, quantized=QuantizedSource(OneAdded()))
    match = _PERMUTED.fullmatch(name)
    return target if match is None or not heads else _unpermuted(target, heads[match[1]])


def _unpermuted(target: WeightTarget, num_heads: int) -> WeightTarget:
    """The target of a tensor whose rows are, in each head, (0, D/2, 1, D/2 + 1, …) and not (0, 1, 2, …)."""
    size = target.shape[0] // num_heads
    (begin, end), *rest = target.region
    region: Region = ((begin // size, end // size), (0, size // 2), (0, 2), *rest)
    view = (num_heads, size // 2, 2, *target.shape[1:])
    return replace(target, view=view, region=region, arrange=partial(_in_pairs, size))


def _in_pairs(head_size: int, rows: torch.Tensor) -> torch.Tensor:
    """(H * D, ...) as (H, D/2, 2, ...)."""
    pairs: torch.Tensor = rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2)
    return pairs
