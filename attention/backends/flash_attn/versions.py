"""Which FlashAttention there is: packages, what each can do, and the choice among them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from attention.backends.flash_attn import calls
from attention.backends.flash_attn.calls import Kernel
from attention.errors import AttentionBackendError
from attention.platform import PACKAGES, Platform
from attention.selection.forced import Forced
from attention.spec import AttentionSpec, Feature

_SMALL_PAGE = 32
_WIDE_HEAD = 192
_NATIVE = frozenset({Feature.SLIDING_WINDOW, Feature.SOFT_CAP, Feature.ALIBI, Feature.SINKS})


class FlashAttnVersion(IntEnum):
    """Generations of the kernel."""

    FA2 = 2
    FA3 = 3
    FA4 = 4


@dataclass(frozen=True)
class Provider:
    """A package that brings FlashAttention.

    Attributes:
        version: the generation.
        package: its name in `PACKAGES`; None: PyTorch itself.
        low: lowest compute capability.
        high: one past the highest.
        native: what it can do of sliding windows, soft cap, ALiBi and sinks. Sinks can be put in afterwards.
        page_step: page sizes that it reads through block tables are multiples of this; 0: it reads none.
        stale_rows: whether it may read what lies behind a sequence's last key in a page as long as one of its tiles,
            and let it into the sum with a weight of zero, which NaN survives.
        kernel: runs a call.
    """

    version: FlashAttnVersion
    package: str | None
    low: tuple[int, int]
    high: tuple[int, int]
    native: frozenset[Feature]
    page_step: int
    stale_rows: bool
    kernel: Kernel

    def __str__(self) -> str:
        return f"FA{self.version} of {PACKAGES[self.package][1] if self.package else 'PyTorch'}"

    def refuse(self, platform: Platform, spec: AttentionSpec) -> list[str]:
        """Why it cannot run such layers there; empty when it can."""
        reasons = []
        capability = platform.capability or (0, 0)
        if not self.low <= capability < self.high:
            reasons.append(f"{self} is not made for {platform.sm or platform}")
        if self.package is not None and self.package not in platform.packages:
            reasons.append(f"{PACKAGES[self.package][1]} is not installed")
        elif not reasons and not platform.simulated and not calls.is_built(self.package, self.version):
            reasons.append(f"{self} is not in this build of it")
        missing = sorted((spec.features & _NATIVE) - self.native - {Feature.SINKS})
        reasons += [f"{self} has no {feature}" for feature in missing]
        return reasons

    def page_size(self, block_size: int, head_size: int) -> int | None:
        """The pages that it should be told a cache of such blocks has, which divide a block; None: it cannot read it.

        Args:
            block_size: tokens in a block.
            head_size: D.
        """
        if self.package is None and not calls.torch_takes_block_tables():
            return None
        page = block_size
        smallest_tile = 64 if head_size > _WIDE_HEAD else 80
        if self.stale_rows and block_size >= smallest_tile:
            if block_size % _SMALL_PAGE:
                return None
            page = _SMALL_PAGE
        return page if self.page_step and page % self.page_step == 0 else None


_HOPPER, _BLACKWELL, _END = (9, 0), (10, 0), (99, 0)
_AMPERE = (8, 0)
_CAP = frozenset({Feature.SOFT_CAP})
_WINDOW = frozenset({Feature.SLIDING_WINDOW})
_IN_FA2 = _CAP | _WINDOW | {Feature.ALIBI}
_IN_FA4 = _CAP | _WINDOW | {Feature.SINKS}
_FA2, _FA3, _FA4 = FlashAttnVersion.FA2, FlashAttnVersion.FA3, FlashAttnVersion.FA4
_VLLM_3 = functools.partial(calls.vllm_flash_attn, 3)
_VLLM_2 = functools.partial(calls.vllm_flash_attn, 2)

PROVIDERS = (
    Provider(_FA4, "flash_attn_4", _BLACKWELL, (12, 0), _IN_FA4, 1, True, calls.flash_attn_4),
    Provider(_FA3, "vllm_flash_attn", _HOPPER, _BLACKWELL, _CAP, 1, True, _VLLM_3),
    Provider(_FA3, "flash_attn_3", _HOPPER, _BLACKWELL, _CAP, 1, True, calls.flash_attn_3),
    Provider(_FA4, "flash_attn_4", _HOPPER, _BLACKWELL, _IN_FA4, 1, True, calls.flash_attn_4),
    Provider(_FA2, "vllm_flash_attn", _AMPERE, _END, _IN_FA2, 16, False, _VLLM_2),
    Provider(_FA2, "flash_attn", _AMPERE, _END, _IN_FA2, 256, False, calls.flash_attn_2),
    Provider(_FA2, None, _AMPERE, _END, _WINDOW, 256, False, calls.torch_flash_attention),
)
"""Best first: FA4 was written for Blackwell, FA3 for Hopper.

FA3 is given no sliding windows: in vLLM 0.26's build, on an H200, windows of most sizes above 256 gave wrong outputs in
sequences longer than they are (1000 in 2048 tokens: off by 2 % of the norm, single tokens by 80 %), however the keys
were read. vLLM's FA3 knows sinks too, but rounds them to bfloat16; put in afterwards they stay exact.
"""

_FORCED = Forced[FlashAttnVersion]()


@contextmanager
def force_flash_attn_version(version: int) -> Iterator[None]:
    """Make FLASH_ATTN use this generation of FlashAttention, or be refused.

    On every thread of the process, as `force_attn_backend`. Builders and layers look when they are made, and keep what
    they found.

    Raises:
        AttentionBackendError: there is no such generation.
    """
    if version not in set(FlashAttnVersion):
        known = ", ".join(str(int(v)) for v in FlashAttnVersion)
        raise AttentionBackendError(f"no FlashAttention version {version}: one of {known}")
    with _FORCED.force(FlashAttnVersion(version)):
        yield


def choose_provider(platform: Platform, spec: AttentionSpec) -> Provider:
    """The best package that runs such layers there.

    Raises:
        AttentionBackendError: none does; with the reasons.
    """
    reasons: list[str] = []
    for provider in _allowed():
        against = provider.refuse(platform, spec)
        if not against:
            return provider
        reasons += against
    raise AttentionBackendError(f"no FlashAttention: {'; '.join(dict.fromkeys(reasons))}")


def refuse_providers(platform: Platform, spec: AttentionSpec) -> list[str]:
    """Why no package runs such layers there; empty when one does."""
    against = [provider.refuse(platform, spec) for provider in _allowed()]
    if not all(against):
        return []
    forced = _forced()
    reasons = list(dict.fromkeys(reason for reasons in against for reason in reasons))
    return [f"FlashAttention {int(forced)} is forced, and {reason}" for reason in reasons] if forced else reasons


def _forced() -> FlashAttnVersion | None:
    return next(reversed(_FORCED.values()), None)


def _allowed() -> list[Provider]:
    forced = _forced()
    return [provider for provider in PROVIDERS if forced is None or provider.version is forced]
