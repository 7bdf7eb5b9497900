"""What a checkpoint's `quantization_config` may say: the weights are as they are, the KV cache may be FP8.

The scales of such a cache lie among the weights, see `workers.loading.kv_scales`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from workers.loading.config_reader import ConfigReader

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


def refuse_quantized_weights(read: ConfigReader, accepted: Collection[str] = ()) -> None:
    """Accept no quantization, that of the KV cache to FP8 alone, or one that the family reads.

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
    for key in _OF_WEIGHTS[method]:
        if inner.get(key):
            raise inner.error(key, "checkpoints with quantized weights are not supported")
    schemes = [key for key in _OF_CACHE if inner.get(key)]
    if not schemes:
        raise read.error("quantization_config", f"says what is quantized in neither {' nor '.join(_OF_CACHE)}")
    for key in schemes:
        if not _is_fp8(inner.get(key), method):
            raise inner.error(key, f"{inner.get(key)!r} is not supported, only an FP8 KV cache with a scale a tensor")


def _is_fp8(scheme: Any, method: str) -> bool:
    if isinstance(scheme, Mapping):
        per_tensor = scheme.get("strategy") in (None, "tensor")
        return scheme.get("num_bits") == 8 and scheme.get("type") == "float" and per_tensor
    return str(scheme).lower() == "fp8" or (method == "fp8" and scheme == "static")
