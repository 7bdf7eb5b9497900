"""Reading the shape of a model's heads, and of layers that differ in their windows."""

from __future__ import annotations

from collections.abc import Sequence

from workers.loading.config_reader import ConfigReader
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.rope import PLAIN, RopeFamily, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"


def read_heads(
    read: ConfigReader, *, num_kv_heads: int | None = None, head_size: int | None = None
) -> tuple[int, int, int]:
    """Hq, Hkv and D.

    Args:
        read: config.json.
        num_kv_heads: where the key is absent; None: it must be there.
        head_size: where the key is absent; None: what is left of the hidden size for each head.

    Raises:
        CheckpointError: they do not divide each other; names file and key.
    """
    num_heads, hidden_size = read.positive_int("num_attention_heads"), read.positive_int("hidden_size")
    num_kv_heads = read.positive_int("num_key_value_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise read.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, which is {num_heads}"
        )
    if read.get("head_dim") is None and head_size is None and hidden_size % num_heads:
        raise read.error("head_dim", f"is missing, and {num_heads} heads do not divide hidden_size {hidden_size}")
    head_size = read.positive_int("head_dim", hidden_size // num_heads if head_size is None else head_size)
    if head_size % 2:
        raise read.error("head_dim", f"must be even for rotary embeddings, not {head_size}")
    return num_heads, num_kv_heads, head_size


def read_attention(
    read: ConfigReader,
    windows: Sequence[int | None] | None = None,
    *,
    num_kv_heads: int | None = None,
    head_size: int | None = None,
    rope: RopeFamily = PLAIN,
    scale: float | None = None,
) -> tuple[AttentionConfig, ...]:
    """Layers that are alike but for their windows.

    Args:
        read: config.json.
        windows: of each layer; None: no layer has one.
        num_kv_heads: see `read_heads`.
        head_size: see `read_heads`.
        rope: what the family adds to the rotation.
        scale: of the scores; None: D^-1/2.

    Raises:
        CheckpointError: a value is missing or wrong; names file and key.
    """
    heads, kv_heads, size = read_heads(read, num_kv_heads=num_kv_heads, head_size=head_size)
    rotation = read_rope(read, size, read.positive_int("max_position_embeddings"), rope)
    if windows is None:
        windows = (None,) * read.positive_int("num_hidden_layers")
    scale = size**-0.5 if scale is None else scale
    return tuple(AttentionConfig(heads, kv_heads, size, scale, rotation, window) for window in windows)


def read_layer_types(read: ConfigReader, known: Sequence[str], default: Sequence[str] | None = None) -> tuple[str, ...]:
    """The type of each layer.

    Args:
        read: config.json.
        known: types that the family has.
        default: where the key is absent; None: it must be there.

    Raises:
        CheckpointError: not a known type for each layer; names file and key.
    """
    num_layers, kinds = read.positive_int("num_hidden_layers"), read.get("layer_types")
    if kinds is None and default is not None:
        kinds = list(default)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise read.error("layer_types", f"must be a list of {num_layers} names, one per layer")
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise read.error("layer_types", f"{unknown[0]!r} is not supported, only {' and '.join(known)}")
    return tuple(kinds)


def refuse_other_layer_types(read: ConfigReader, only: str) -> None:
    """Refuse types of layers in a family whose layers are all of one.

    Raises:
        CheckpointError: names file, key and type.
    """
    kinds = read.get("layer_types")
    others = [kind for kind in kinds if kind != only] if isinstance(kinds, list) else []
    if others:
        raise read.error("layer_types", f"{others[0]!r} is not supported: all layers of this model are {only}")


def windows_of(types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """`window` for each layer of sliding attention, None for the others."""
    return tuple(window if kind == SLIDING else None for kind in types)
