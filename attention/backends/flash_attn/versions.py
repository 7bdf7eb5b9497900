"""Which FlashAttention there is: packages, what each can do, and the choice among them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from attention.backends.flash_attn import calls, fa4
from attention.backends.flash_attn.calls import Kernel
from attention.backends.flash_attn.trial import kernel_fault
from attention.broken import import_fault, report_broken
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
        module: what holds its kernels; None: the package itself.
        built: what that module is asked for, and says whether this generation was built.
        decode_rank: providers with a lower one come first for batches of one token a sequence.
        gather_from: how many query heads must see a key, on average, for copying keys out of their pages to pay; None:
            it never does. See `attention.backends.flash_attn.gathering`.
        compiles: whether its kernels are compiled when they are first called.
    """

    version: FlashAttnVersion
    package: str | None
    low: tuple[int, int]
    high: tuple[int, int]
    native: frozenset[Feature]
    page_step: int
    stale_rows: bool
    kernel: Kernel
    module: str | None = None
    built: tuple[str, ...] = ()
    decode_rank: int = 0
    gather_from: int | None = None
    compiles: bool = False

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
        missing = sorted((spec.features & _NATIVE) - self.native - {Feature.SINKS})
        reasons += [f"{self} has no {feature}" for feature in missing]
        if not reasons and not platform.simulated and (fault := self.fault()) is not None:
            reasons.append(f"{self} is installed and cannot be used: {fault}")
        return reasons

    def fault(self) -> str | None:
        """Why an installed package is of no use; None when nothing is wrong with it. Imports it, and tries it once."""
        if self.package is None:
            return None
        fault = import_fault(self.package, self.module, self.built, str(self))
        if fault is None and torch.cuda.is_available():
            fault = kernel_fault(self.kernel, torch.device("cuda", torch.cuda.current_device()))
            if fault is not None:
                report_broken(str(self), fault)
        return fault

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
_VLLM = "vllm_flash_attn.flash_attn_interface"
_VLLM_3 = Provider(
    _FA3, "vllm_flash_attn", _HOPPER, _BLACKWELL, _CAP, 1, True,
    functools.partial(calls.vllm_flash_attn, 3), _VLLM, ("flash_attn_varlen_func", "FA3_AVAILABLE"),
)  # fmt: skip
_VLLM_2 = Provider(
    _FA2, "vllm_flash_attn", _AMPERE, _END, _IN_FA2, 16, False,
    functools.partial(calls.vllm_flash_attn, 2), _VLLM, ("flash_attn_varlen_func", "FA2_AVAILABLE"),
)  # fmt: skip
_FLASH_ATTN_4 = Provider(
    _FA4, "flash_attn_4", _BLACKWELL, (12, 0), _IN_FA4, 1, True,
    functools.partial(fa4.flash_attn_4, True), fa4.MODULE, ("flash_attn_varlen_func",), compiles=True,
)  # fmt: skip
_FLASH_ATTN_4_HOPPER = replace(
    _FLASH_ATTN_4, low=_HOPPER, high=_BLACKWELL, kernel=functools.partial(fa4.flash_attn_4, False),
    decode_rank=1, gather_from=8192,
)  # fmt: skip
_FLASH_ATTN_3 = Provider(
    _FA3, "flash_attn_3", _HOPPER, _BLACKWELL, _CAP, 1, True, calls.flash_attn_3, None,
    ("flash_attn_varlen_func", "flash_attn_with_kvcache"),
)  # fmt: skip
_FLASH_ATTN_2 = Provider(
    _FA2, "flash_attn", _AMPERE, _END, _IN_FA2, 256, False, calls.flash_attn_2, None, ("flash_attn_varlen_func",)
)
_PYTORCH = Provider(_FA2, None, _AMPERE, _END, _WINDOW, 256, False, calls.torch_flash_attention, decode_rank=2)

PROVIDERS = (
    _FLASH_ATTN_4,
    _FLASH_ATTN_4_HOPPER,
    _VLLM_3,
    _FLASH_ATTN_3,
    _VLLM_2,
    _FLASH_ATTN_2,
    _PYTORCH,
)
"""Best first for prompts. On an H200 (8 sequences of 4,096 tokens, 32 query and 8 KV heads of 128) FA4 reaches 643
TFLOP/s, and 585 where it reads pages that are no tile of its own; FA3 as vLLM builds it 600 to 621.

For Hopper, FA4 cannot divide one sequence's keys among processors, so that FA3 and FA2 decode faster. FA3 is given no
sliding windows: in vLLM 0.26's build, on an H200, windows of most sizes above 256 gave wrong outputs in sequences
longer than they are (1000 in 2048 tokens: off by 2 % of the norm, single tokens by 80 %), however the keys were read.
vLLM's FA3 knows sinks too, but rounds them to bfloat16; put in afterwards they stay exact.
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


def choose_provider(platform: Platform, spec: AttentionSpec, decode: bool = False) -> Provider:
    """The best package that runs such layers there.

    Args:
        platform: where they run.
        spec: the layers.
        decode: for batches in which every sequence brings one token.

    Raises:
        AttentionBackendError: none does; with the reasons.
    """
    reasons: list[str] = []
    for provider in sorted(_allowed(), key=lambda provider: provider.decode_rank if decode else 0):
        against = provider.refuse(platform, spec)
        if not against:
            return provider
        reasons += against
    raise AttentionBackendError(f"no FlashAttention: {'; '.join(dict.fromkeys(reasons))}")


def refuse_providers(platform: Platform, spec: AttentionSpec) -> list[str]:
    """Why no package runs such layers there; empty when one does."""
    reasons: list[str] = []
    for provider in _allowed():
        against = provider.refuse(platform, spec)
        if not against:
            return []
        reasons += against
    reasons, forced = list(dict.fromkeys(reasons)), _forced()
    return [f"FlashAttention {int(forced)} is forced, and {reason}" for reason in reasons] if forced else reasons


def _forced() -> FlashAttnVersion | None:
    return next(reversed(_FORCED.values()), None)


def _allowed() -> list[Provider]:
    forced = _forced()
    return [provider for provider in PROVIDERS if forced is None or provider.version is forced]
