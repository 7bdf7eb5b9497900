"""Reading the settings of one kind of rotary position embedding, with defaults as in transformers 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from workers.loading.config_reader import ConfigReader
from workers.ops.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)


@dataclass(frozen=True)
class RopeSettings:
    """The settings of a kind, and what they are read with.

    Attributes:
        read: the settings.
        theta: the base of the frequencies.
        rotary_dim: how many of a head's dimensions are rotated.
        max_positions: the model's `max_position_embeddings`.
        original_max_positions: the original context that is stated beside the settings, which wins; None: it is not.
    """

    read: ConfigReader
    theta: float
    rotary_dim: int
    max_positions: int
    original_max_positions: int | None

    def original(self) -> int:
        """The context that the model had before it was extended; where nothing says so, its present one."""
        inside = self.read.positive_int("original_max_position_embeddings", self.max_positions)
        return inside if self.original_max_positions is None else self.original_max_positions

    def attention_factor(self) -> float | None:
        """The stated one; None: it is to be computed."""
        return None if self.read.get("attention_factor") is None else self.read.positive_float("attention_factor")


def _linear(settings: RopeSettings) -> RopeScaling:
    return LinearScaling(settings.read.positive_float("factor"))


def _dynamic(settings: RopeSettings) -> RopeScaling:
    if settings.rotary_dim < 4:
        raise settings.read.error("rope_type", f"'dynamic' rotates at least 4 dimensions, not {settings.rotary_dim}")
    return DynamicScaling(settings.read.positive_float("factor"), settings.max_positions)


def _yarn(settings: RopeSettings) -> RopeScaling:
    read, original = settings.read, settings.original()
    if settings.theta <= 1:
        raise read.error("rope_theta", f"must be above 1 for 'yarn', not {settings.theta}")
    # A factor that is null, and not one that is missing, is the ratio of the lengths.
    factor = read.positive_float("factor", settings.max_positions / original if "factor" in read else None)
    fast, slow = (
        read.non_negative_float(key, default) or default for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast < slow:
        raise read.error("beta_fast", f"{fast} must be at least beta_slow, which is {slow}")
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=read.flag("truncate", True),
        attention_factor=settings.attention_factor(),
        mscale=read.non_negative_float("mscale", 0.0),
        mscale_all_dim=read.non_negative_float("mscale_all_dim", 0.0),
    )


def _longrope(settings: RopeSettings) -> RopeScaling:
    read, original = settings.read, settings.original()
    if original < 2:
        raise read.error("original_max_position_embeddings", f"must be at least 2 for 'longrope', not {original}")
    factors = {}
    for key in ("short_factor", "long_factor"):
        factors[key] = read.positive_float_list(key)
        if len(factors[key]) != settings.rotary_dim // 2:
            raise read.error(
                key, f"has {len(factors[key])} numbers for the {settings.rotary_dim // 2} pairs that a head rotates"
            )
    factor = read.positive_float("factor", settings.max_positions / original)
    return LongRopeScaling(
        **factors,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=settings.attention_factor(),
    )


def _llama3(settings: RopeSettings) -> RopeScaling:
    read = settings.read
    scaling = Llama3Scaling(
        factor=read.positive_float("factor"),
        low_freq_factor=read.positive_float("low_freq_factor"),
        high_freq_factor=read.positive_float("high_freq_factor"),
        original_max_position_embeddings=settings.original(),
    )
    if scaling.high_freq_factor < scaling.low_freq_factor:
        raise read.error(
            "high_freq_factor",
            f"{scaling.high_freq_factor} must be at least low_freq_factor, which is {scaling.low_freq_factor}",
        )
    return scaling


def _proportional(settings: RopeSettings) -> RopeScaling:
    return ProportionalScaling(settings.read.positive_float("factor", 1.0))


SCALED_KINDS: Mapping[str, Callable[[RopeSettings], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
"""How the settings of each `rope_type` are read, besides `default`, which has none."""
