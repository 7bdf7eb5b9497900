"""What a backend can do, as data: rows of the table in docs/attention.md, and the reasons of a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from attention.platform import PACKAGES, DeviceKind, Platform
from attention.spec import FP8, AttentionNeeds, AttentionType, Feature, Phase

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


HOPPER = "SM 9.0"
X86 = "x86_64"


class Evidence(StrEnum):
    """How it is known that a backend runs on a platform."""

    RAN = "ran on this architecture"
    ADAPTER = "adapter to the real library; never run on this architecture"


@dataclass(frozen=True)
class Sizes:
    """Accepted sizes: from `low` to `high`, multiples of `step`, or exactly those in `only`."""

    low: int = 1
    high: int | None = None
    step: int = 1
    only: tuple[int, ...] = ()

    def accepts(self, size: int) -> bool:
        """Whether this size is one of them."""
        if self.only:
            return size in self.only
        return self.low <= size and (self.high is None or size <= self.high) and size % self.step == 0

    def __str__(self) -> str:
        if self.only:
            return ", ".join(map(str, self.only))
        span = "any" if self.low == 1 else f"from {self.low}"
        if self.high is not None:
            span = f"{self.low} to {self.high}"
        return f"{span}, multiples of {self.step}" if self.step > 1 else span


@dataclass(frozen=True)
class DeviceSupport:
    """Hardware that a backend runs on.

    Attributes:
        kind: the family.
        low: lowest compute capability, CUDA only.
        high: one past the highest compute capability, CUDA only.
        archs: prefixes of accepted architectures; empty: all.
        packages: libraries that must be installed.
        any_of: libraries of which one must be installed.
        ran_on: architectures, as `Platform.architecture` names them, on which Baton's tests have run it. What else the
            row covers is what the kernels' documentation says.
    """

    kind: DeviceKind
    low: tuple[int, int] | None = None
    high: tuple[int, int] | None = None
    archs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    ran_on: tuple[str, ...] = ()

    def evidence(self, platform: Platform) -> Evidence:
        """How it is known to run on a platform that is not refused."""
        return Evidence.RAN if platform.architecture in self.ran_on else Evidence.ADAPTER

    def refuse(self, platform: Platform) -> list[str]:
        """Why a platform of this family will not do; empty when it will."""
        reasons = []
        if platform.capability is not None:
            if self.low is not None and platform.capability < self.low:
                reasons.append(f"needs SM {_dotted(self.low)} or newer, this is {platform.sm}")
            if self.high is not None and platform.capability >= self.high:
                reasons.append(f"made for devices older than SM {_dotted(self.high)}, this is {platform.sm}")
        if self.archs and not (platform.arch or "").startswith(self.archs):
            reasons.append(f"needs an architecture of {', '.join(self.archs)}, this is {platform.arch}")
        missing = [package for package in self.packages if package not in platform.packages]
        reasons += [f"{_name(package)} is not installed" for package in missing]
        if self.any_of and not any(package in platform.packages for package in self.any_of):
            reasons.append(f"none of {', '.join(map(_name, self.any_of))} is installed")
        return reasons

    def __str__(self) -> str:
        text = str(self.kind)
        if self.low:
            text += f" SM {_dotted(self.low)}+"
        if self.high:
            text += f" below SM {_dotted(self.high)}"
        if self.archs:
            text += f" {'/'.join(self.archs)}"
        return text


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        devices: hardware; several entries of one family are alternatives.
        dtypes: of queries, keys and values.
        head_sizes: accepted D.
        block_sizes: accepted tokens in a KV block.
        features: what it can do of `Feature`.
        refused: a better reason than "cannot do it" for features that are missing.
        attention_types: accepted.
        phases: batches it is made for.
        mla: whether it is made for multi-head latent attention, and nothing else.
    """

    devices: tuple[DeviceSupport, ...]
    dtypes: tuple[torch.dtype, ...]
    features: frozenset[Feature]
    head_sizes: Sizes = Sizes()
    block_sizes: Sizes = Sizes()
    refused: Mapping[Feature, str] = field(default_factory=dict)
    attention_types: tuple[AttentionType, ...] = (AttentionType.DECODER,)
    phases: tuple[Phase, ...] = (Phase.PREFILL, Phase.DECODE)
    mla: bool = False

    def refuse(self, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Why this cannot be had there, one reason a line; empty when it can."""
        return [*self._refuse_platform(platform, needs.dtype), *self._refuse_needs(needs)]

    def evidence(self, platform: Platform) -> Evidence | None:
        """How it is known to run on such a platform; None where it does not."""
        for support in self.devices:
            if support.kind is platform.kind and not support.refuse(platform):
                return support.evidence(platform)
        return None

    def _refuse_platform(self, platform: Platform, dtype: torch.dtype) -> list[str]:
        family = [support for support in self.devices if support.kind is platform.kind]
        if not family:
            kinds = ", ".join(dict.fromkeys(str(support.kind) for support in self.devices))
            return [f"runs on {kinds}, not on {platform.kind}"]
        # Of several that refuse for as many reasons, the one that asks least.
        nearest = min(family, key=lambda support: (len(support.refuse(platform)), support.low or (0, 0)))
        reasons = nearest.refuse(platform)
        lack = platform.lacks(dtype)
        return reasons if lack is None else [*reasons, lack]

    def _refuse_needs(self, needs: AttentionNeeds) -> list[str]:
        spec = needs.spec
        reasons = spec.faults()
        if (spec.mla is not None) != self.mla:
            reasons.append("made for MLA layers only" if self.mla else "not made for MLA layers")
        if needs.dtype not in self.dtypes:
            reasons.append(f"dtype {_short(needs.dtype)} is none of {', '.join(map(_short, self.dtypes))}")
        if not self.head_sizes.accepts(spec.head_size):
            reasons.append(f"head size {spec.head_size} is not one of: {self.head_sizes}")
        if spec.attn_type.cached and not self.block_sizes.accepts(needs.block_size):
            reasons.append(f"block size {needs.block_size} is not one of: {self.block_sizes}")
        if spec.attn_type not in self.attention_types:
            reasons.append(f"attention type {spec.attn_type} is none of {', '.join(self.attention_types)}")
        if needs.phase is not None and needs.phase not in self.phases:
            reasons.append(f"made for {' and '.join(self.phases)}, not for {needs.phase}")
        if spec.attn_type.cached and spec.kv_cache_dtype not in (None, needs.dtype, FP8):
            reasons.append(f"a KV cache of {_short(spec.kv_cache_dtype)} beside {_short(needs.dtype)} is not known")
        for feature in sorted(needs.all_features - self.features):
            reasons.append(self.refused.get(feature, f"{feature} is not supported"))
        return reasons


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _name(package: str) -> str:
    return PACKAGES[package][1]
