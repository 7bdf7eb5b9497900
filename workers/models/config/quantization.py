"""What a checkpoint's `quantization_config` may say: of the weights, and that the KV cache is FP8.

Weights are as they are, or matrices of FP8 with a scale for each block, which every family reads, or what the family
reads. The scales of an FP8 cache lie among the weights, see `workers.loading.kv_scales`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from workers.loading.config_reader import ConfigReader
from workers.loading.quantized_storage import Fp8BlockStorage

_OF_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("config_groups",),
    "fp8": ("activation_scheme", "weight_block_size"),
    "modelopt": ("quant_algo", "config_groups"),
}
"""For each tool that writes checkpoints whose KV cache alone is quantized: its keys that speak of weights."""

_OF_CACHE = ("kv_cache_scheme", "kv_cache_quant_algo")


def weight_format(read: ConfigReader) -> str | None:
    """What `quantization_config` calls its format (`quant_method`); None: there is none.

    Raises:
        CheckpointError: it is no object, or its format no name.
    """
    given = read.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise read.error("quantization_config", f"must be an object, not {given!r}")
    method = given.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise read.error("quantization_config.quant_method", f"must be a name, not {method!r}")
    return method


def read_fp8_blocks(read: ConfigReader) -> Fp8BlockStorage | None:
    """How matrices are stored in FP8 with a scale for each block (DeepSeek-V3, Qwen3's FP8 checkpoints); None: not so.

    Which ones are is not read: those that the checkpoint holds a `weight_scale_inv` of.

    Raises:
        CheckpointError: another format of FP8, or no size of a block; names file and key.
    """
    given = read.get("quantization_config")
    if weight_format(read) != "fp8" or not given.get("weight_block_size"):
        return None
    inner = ConfigReader(given, read.source, prefix="quantization_config.")
    inner.refuse_others({"fmt": "e4m3", "activation_scheme": "dynamic"})
    block = given["weight_block_size"]
    sizes = inner.int_list("weight_block_size")
    if not isinstance(block, list) or len(sizes) != 2 or min(sizes) < 1:
        raise inner.error("weight_block_size", f"must be the rows and columns of a block, not {block!r}")
    return Fp8BlockStorage((sizes[0], sizes[1]))


def refuse_quantized_weights(read: ConfigReader, accepted: Collection[str] = ()) -> None:
    """Accept no quantization, that of the KV cache to FP8 alone, FP8 in blocks, or one that the family reads.

    Args:
        read: config.json.
        accepted: what the family reads, as `quant_method` names it.

    Raises:
        CheckpointError: weights are quantized, or the cache to something else; names the key.
    """
    given = read.get("quantization_config")
    method = weight_format(read)
    if given is None or method in accepted:
        return
    inner = ConfigReader(given, read.source, prefix="quantization_config.")
    if method is None or method not in _OF_WEIGHTS:
        raise inner.error("quant_method", f"{method!r}: checkpoints with quantized weights are not supported")
    in_blocks = read_fp8_blocks(read) is not None
    for key in _OF_WEIGHTS[method]:
        if inner.get(key) and not in_blocks:
            raise inner.error(key, "checkpoints with quantized weights are not supported")
    schemes = [key for key in _OF_CACHE if inner.get(key)]
    if not schemes and not in_blocks:
        raise read.error("quantization_config", f"says what is quantized in neither {' nor '.join(_OF_CACHE)}")
    for key in schemes:
        if not _is_fp8(inner.get(key), method):
            raise inner.error(key, f"{inner.get(key)!r} is not supported, only an FP8 KV cache with a scale a tensor")


def _is_fp8(scheme: Any, method: str) -> bool:
    if isinstance(scheme, Mapping):
        per_tensor = scheme.get("strategy") in (None, "tensor")
        return scheme.get("num_bits") == 8 and scheme.get("type") == "float" and per_tensor
    return str(scheme).lower() == "fp8" or (method == "fp8" and scheme == "static")
