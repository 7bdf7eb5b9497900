"""Which backends to try on which hardware, best first, when nobody has chosen and nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass

from attention.platform import DeviceKind, Platform
from attention.selection.registry import get_backend
from attention.spec import AttentionNeeds, Feature, Phase


@dataclass(frozen=True)
class Entry:
    """A backend's place in an order; one whose place depends on its kernels can have several.

    Attributes:
        name: the backend's.
        generation: the place is its own only with kernels of this generation or a later one.
    """

    name: str
    generation: int | None = None

    def counts(self, platform: Platform, needs: AttentionNeeds) -> bool:
        """Whether the backend has this place there, by the kernels that it would run."""
        if self.generation is None:
            return True
        found = get_backend(self.name).generation(platform, needs)
        return found is not None and found >= self.generation


_HOPPER_PREFILL = (
    Entry("FLASH_ATTN", generation=3),
    Entry("FLASHINFER"),
    Entry("TRITON_ATTN"),
    Entry("FLASH_ATTN"),
    Entry("FLEX_ATTENTION"),
    Entry("XFORMERS"),
    Entry("TORCH_SDPA"),
)
"""As measured on an H200 (benchmarks/results/attention_h200.json; TFLOP/s at 8 × 4096): FA4 643, FA3 600 to 621,
FlashInfer 517 to 555, TRITON_ATTN 444, PyTorch's own FA2 316."""
_HOPPER_SPECIAL_PREFILL = _HOPPER_PREFILL[1:]
"""Layers whose windows or soft cap only FA4 could run, which nobody has measured."""
_HOPPER_DECODE = (
    Entry("TRITON_ATTN"),
    Entry("FLASHINFER"),
    Entry("FLASH_ATTN"),
    *_HOPPER_PREFILL[4:],
)
"""The Triton kernel reads the cache at the memory's speed whatever the block size, and an FP8 cache as it is, which
FlashAttention converts first and FlashInfer gives to its older kernel."""


def candidates(platform: Platform, needs: AttentionNeeds) -> tuple[str, ...]:
    """Names of the backends to try there, best first. Whether each can run what is asked is for it to say."""
    if needs.spec.mla is not None:
        return _mla(platform, needs)
    if Feature.TREE_MASK in needs.all_features:
        return ("TREE_ATTN", *_by_family(platform, needs))
    return _by_family(platform, needs)


def _by_family(platform: Platform, needs: AttentionNeeds) -> tuple[str, ...]:
    if platform.kind is DeviceKind.CUDA:
        return _cuda(platform, needs)
    return {
        DeviceKind.CPU: ("CPU_ATTN", "TORCH_SDPA", "FLEX_ATTENTION", "TRITON_ATTN"),
        DeviceKind.ROCM: ("ROCM_AITER_FA", "ROCM_ATTN", "ROCM_FLASH", "TRITON_ATTN", "FLEX_ATTENTION", "TORCH_SDPA"),
        DeviceKind.TPU: ("PALLAS",),
        DeviceKind.XPU: ("IPEX", "TRITON_ATTN", "TORCH_SDPA"),
    }[platform.kind]


def _cuda(platform: Platform, needs: AttentionNeeds) -> tuple[str, ...]:
    """H200 and H100 are SM 9.0, B200 is SM 10.0, A100 SM 8.0, L40S SM 8.9, T4 SM 7.5."""
    capability = platform.capability or (0, 0)
    others = ("FLEX_ATTENTION", "XFORMERS", "TORCH_SDPA")
    if capability < (8, 0):
        return ("TRITON_ATTN", *others)
    if capability >= (10, 0):
        return ("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN", *others)
    if capability < (9, 0):
        if needs.all_features & {Feature.FP8_KV, Feature.SINKS}:
            return ("TRITON_ATTN", "FLASHINFER", "FLASH_ATTN", *others)
        return ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", *others)
    if needs.phase is Phase.DECODE or Feature.FP8_KV in needs.all_features:
        return _names(_HOPPER_DECODE, platform, needs)
    unmeasured = needs.all_features & {Feature.SLIDING_WINDOW, Feature.SOFT_CAP}
    return _names(_HOPPER_SPECIAL_PREFILL if unmeasured else _HOPPER_PREFILL, platform, needs)


def _names(entries: tuple[Entry, ...], platform: Platform, needs: AttentionNeeds) -> tuple[str, ...]:
    """Those of an order that count there, each where it comes first."""
    names = [entry.name for entry in entries if entry.counts(platform, needs)]
    return tuple(dict.fromkeys(names))


def _mla(platform: Platform, needs: AttentionNeeds) -> tuple[str, ...]:
    if platform.kind is DeviceKind.CUDA:
        return _cuda_mla(platform.capability or (0, 0), needs.phase)
    kinds = {DeviceKind.ROCM: ("ROCM_AITER_MLA", "TRITON_MLA"), DeviceKind.CPU: ("CPU_MLA", "TRITON_MLA")}
    return kinds.get(platform.kind, ())


def _cuda_mla(capability: tuple[int, int], phase: Phase | None) -> tuple[str, ...]:
    """For decode those come first whose steps can be replayed as CUDA graphs."""
    if phase is Phase.PREFILL:
        new = capability >= (9, 0)
        return ("FLASH_ATTN_MLA", "FLASHINFER_MLA", "TRITON_MLA") if new else ("FLASHINFER_MLA", "TRITON_MLA")
    if capability >= (10, 0):
        return ("CUTLASS_MLA", "FLASHINFER_MLA", "FLASH_ATTN_MLA", "TRITON_MLA")
    if capability >= (9, 0):
        return ("FLASHMLA", "TRITON_MLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA")
    return ("TRITON_MLA", "FLASHINFER_MLA")
