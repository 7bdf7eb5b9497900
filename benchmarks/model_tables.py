"""The table of docs/models.md: what the attention of each architecture is, what it caches, and what ran on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.published_models import PUBLISHED
from workers.errors import ConfigError
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.model_config import ModelConfig
from workers.models.registry import ARCHITECTURES, parse_model

_BYTES = 2
"""Of a number in a bfloat16 cache."""
_SCALINGS = {
    "DynamicScaling": "dynamic",
    "LinearScaling": "linear",
    "Llama3Scaling": "llama3",
    "LongRopeScaling": "LongRoPE",
    "ProportionalScaling": "proportional",
    "YarnScaling": "YaRN",
}


def models(_: Path) -> str:
    """A row an architecture, by a model that was published.

    Raises:
        ConfigError: an architecture has none.
    """
    missing = sorted(set(ARCHITECTURES) - set(PUBLISHED))
    if missing:
        raise ConfigError(f"benchmarks/published_models.py has no {', '.join(missing)}")
    header = (
        "architecture",
        "for example",
        "attention",
        "rotation",
        "cache groups",
        "ran on a GPU",
        "KV bytes a token",
        "of them without a window",
    )
    rows = [_row(architecture) for architecture in sorted(ARCHITECTURES)]
    return table(header, rows, num_text_columns=6)


TABLES: Mapping[str, Callable[[Path], str]] = {"models": models}


def kv_bytes_per_token(layers: tuple[AttentionConfig, ...]) -> int:
    """What a token takes in the bfloat16 caches of these layers: keys and values, or a latent."""
    return sum((1 if layer.mla else 2) * layer.num_kv_heads * layer.head_size * _BYTES for layer in layers)


def cache_groups(config: ModelConfig) -> Mapping[str, int]:
    """Layers by what their caches keep."""
    return Counter(map(_cache_kind, config.attention))


def _row(architecture: str) -> tuple[str, ...]:
    model = PUBLISHED[architecture]
    config = parse_model({**model.config, "architectures": [architecture]}, source=model.name)[1]
    growing = tuple(layer for layer in config.attention if _cache_kind(layer) in ("full", "latent"))
    return (
        f"`{architecture}`",
        model.name,
        "; ".join(dict.fromkeys(map(_heads, config.attention))),
        _rotation(config),
        ", ".join(f"{number} {kind}" for kind, number in sorted(cache_groups(config).items())),
        model.on_gpu or "—",
        f"{kv_bytes_per_token(config.attention):,}",
        f"{kv_bytes_per_token(growing):,}",
    )


def _cache_kind(layer: AttentionConfig) -> str:
    if layer.mla is not None:
        return "latent"
    if layer.chunk_size is not None:
        return f"chunked ({layer.chunk_size})"
    return "full" if layer.sliding_window is None else f"sliding ({layer.sliding_window})"


def _heads(layer: AttentionConfig) -> str:
    if layer.mla is not None:
        kind = "MLA"
    elif layer.num_kv_heads == layer.num_heads:
        kind = "MHA"
    else:
        kind = "MQA" if layer.num_kv_heads == 1 else "GQA"
    more = (", sinks" if layer.has_sinks else "") + ("" if layer.soft_cap is None else f", cap {layer.soft_cap:g}")
    return f"{kind}, {layer.num_heads} over {layer.num_kv_heads} heads of {layer.head_size}{more}"


def _rotation(config: ModelConfig) -> str:
    """How layers rotate, with their numbers where they differ."""
    counts = Counter(map(_rope, config.attention))
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{name} in {number} layers" for name, number in counts.items())


def _rope(layer: AttentionConfig) -> str:
    rope, mla = layer.rope, layer.mla
    if rope is None:
        return "none"
    parts = ["whole heads" if rope.partial_rotary_factor == 1 else f"{rope.partial_rotary_factor:.0%}"]
    if mla is not None:
        parts = [f"{mla.qk_rope_head_dim} of {mla.qk_nope_head_dim + mla.qk_rope_head_dim}"]
    if rope.interleaved:
        parts.append("in pairs")
    if rope.scaling is not None:
        parts.append(_SCALINGS[type(rope.scaling).__name__])
    return ", ".join(parts)
