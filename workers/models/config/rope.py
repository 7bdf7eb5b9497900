"""Reading the rotary position embedding of a checkpoint's config.json, in both spellings and as transformers 5 does.

`rope_parameters` (transformers 5) or `rope_scaling` (before) hold the settings; where both are there, `rope_scaling` is
taken whole. Inside, `rope_type` wins over `type`. `rope_theta` and `partial_rotary_factor` are taken from inside and,
if they are not there, from beside; `original_max_position_embeddings` from beside and, if not there, from inside.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from workers.loading.config_reader import ConfigReader
from workers.models.config.rope_kinds import SCALED_KINDS, RopeSettings
from workers.ops.rope_config import RopeConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RopeFamily:
    """What a family of models adds to its config.json.

    Attributes:
        theta: where no `rope_theta` is stated.
        partial_rotary_factor: where none is stated; None: the family rotates whole heads, and another part is refused.
        interleaved: see `RopeConfig`.
        parameters: where neither spelling is there.
        original_max_position_embeddings: where none is stated beside the settings.
        renamed: kinds that mean another in this family.
    """

    theta: float = 10000.0
    partial_rotary_factor: float | None = None
    interleaved: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    original_max_position_embeddings: int | None = None
    renamed: Mapping[str, str] = field(default_factory=lambda: {"su": "longrope"})


PLAIN = RopeFamily()


@dataclass(frozen=True)
class _Context:
    """What the settings of one layer type are read with: the file around them and the head they are for."""

    read: ConfigReader
    family: RopeFamily
    head_size: int
    max_positions: int
    original_max_positions: int | None


def read_rope(read: ConfigReader, head_size: int, max_positions: int, family: RopeFamily = PLAIN) -> RopeConfig:
    """The rotation of a model whose layers all have the same.

    Args:
        read: the config.
        head_size: D, or how much of a head comes rotated (DeepSeek's `qk_rope_head_dim`).
        max_positions: its `max_position_embeddings`.
        family: what its family adds.

    Raises:
        CheckpointError: a kind that Baton does not know, or a value out of range; names file and key.
    """
    key, given = _settings(read, family)
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise read.error(f"{key}.{name}", "rope settings per kind of layer are not supported for this architecture")
    original = read.optional_positive_int("original_max_position_embeddings")
    original = family.original_max_position_embeddings if original is None else original
    context = _Context(read, family, head_size, max_positions, original)
    return _rope(context, ConfigReader(given, read.source, prefix=f"{key}."), family.theta)


def read_global_and_local_rope(
    read: ConfigReader, head_size: int, max_positions: int, family: RopeFamily, local_theta: float = 10000.0
) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of Gemma-3's layers: of those with full attention and of those with a window.

    Before transformers 5 `rope_theta` and `rope_scaling` were those of full attention, `rope_local_base_freq` that of
    the windows. Since then `rope_parameters` has an object for each, and a `rope_scaling` beside it adds to the first.

    Raises:
        CheckpointError: as `read_rope`.
    """
    key = "rope_parameters"
    nested, scaling = _object(read, key), _object(read, "rope_scaling")
    if nested and not {"full_attention", "sliding_attention"} & nested.keys():
        raise read.error(key, f"needs full_attention and sliding_attention, and has {', '.join(map(repr, nested))}")
    of_each = ConfigReader(nested, read.source, prefix=f"{key}.")
    full, local = _object(of_each, "full_attention"), _object(of_each, "sliding_attention")
    if "type" in scaling and "rope_type" not in scaling:
        scaling = {**scaling, "rope_type": scaling["type"]}
    full_key = "rope_scaling" if scaling else f"{key}.full_attention"
    context = _Context(read, family, head_size, max_positions, None)
    return (
        _rope(context, _reader(read, full_key, {**full, **scaling}), family.theta),
        _rope(context, _reader(read, f"{key}.sliding_attention", local), local_theta, "rope_local_base_freq"),
    )


def read_rotating_layers(read: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which of Llama-4's layers rotate: 1 in `no_rope_layers`, or all but every `no_rope_layer_interval`th.

    Raises:
        CheckpointError: not a 0 or a 1 for each of `num_layers`; names file and key.
    """
    key = "no_rope_layers"
    stated, interval = read.get(key), read.positive_int("no_rope_layer_interval", 4)
    if not stated:
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(stated, list) or len(stated) != num_layers or any(value not in (0, 1) for value in stated):
        raise read.error(key, f"must be a list of {num_layers} numbers, each 0 or 1, not {stated!r}")
    return tuple(value == 1 for value in stated)


def _settings(read: ConfigReader, family: RopeFamily) -> tuple[str, Mapping[str, Any]]:
    """The key that the settings are taken from, and they."""
    scaling, parameters = _object(read, "rope_scaling"), _object(read, "rope_parameters")
    if scaling and parameters and scaling != parameters:
        logger.warning("%s: rope_scaling and rope_parameters differ: the first is used", read.source)
    for key, given in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if given:
            return key, given
    return "rope_parameters", family.parameters if read.get("rope_parameters") is None else {}


def _object(read: ConfigReader, key: str) -> Mapping[str, Any]:
    given = read.get(key)
    if given is not None and not isinstance(given, Mapping):
        raise read.error(key, f"must be an object, not {given!r}")
    return given or {}


def _reader(read: ConfigReader, key: str, settings: Any) -> ConfigReader:
    if not isinstance(settings, Mapping):
        raise read.error(key, f"must be an object, not {settings!r}")
    return ConfigReader(settings, read.source, prefix=f"{key}.")


def _rope(context: _Context, rope: ConfigReader, theta: float, theta_key: str = "rope_theta") -> RopeConfig:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if isinstance(kind, str):
        kind = context.family.renamed.get(kind, kind)
    known = ("default", *SCALED_KINDS)
    if kind not in known:
        raise rope.error("rope_type", f"{kind!r} is not supported, only {', '.join(map(repr, known))}")
    theta = rope.positive_float("rope_theta", context.read.positive_float(theta_key, theta))
    partial = _partial_rotary_factor(context, rope, kind)
    config = RopeConfig(theta, None, partial, context.family.interleaved)
    if kind == "default":
        return config
    settings = RopeSettings(
        rope, theta, config.rotary_dim(context.head_size), context.max_positions, context.original_max_positions
    )
    return replace(config, scaling=SCALED_KINDS[kind](settings))


def _partial_rotary_factor(context: _Context, rope: ConfigReader, kind: str) -> float:
    key, default = "partial_rotary_factor", context.family.partial_rotary_factor
    read = rope if rope.get(key) is not None else context.read
    factor = read.positive_float(key, 1.0 if default is None else default)
    if factor > 1:
        raise read.error(key, f"must be at most 1, not {factor}")
    if kind == "proportional":
        return factor
    if default is None and factor != 1:
        raise read.error(key, f"{factor} is not supported for this architecture, only 1.0")
    rotated = int(context.head_size * factor)
    if rotated < 2 or rotated % 2:
        raise read.error(
            key, f"{factor} of a head of {context.head_size} is {rotated}, which must be even and at least 2"
        )
    return factor
