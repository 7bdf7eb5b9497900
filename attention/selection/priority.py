"""Which backends to try on which hardware, best first, when nobody has chosen and nothing was measured."""

from __future__ import annotations

from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, Feature, Phase


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
    # Hopper, as measured on an H200 (benchmarks/results/attention_h200.json). In decode the Triton kernel reads the
    # cache at the memory's speed whatever the block size. In prefill FlashAttention 3 leads where a package brings it,
    # but layers with a window run on its second version, and so does PyTorch's own operator; FlashInfer brings its own.
    # Neither reads an FP8 cache without converting it first, or in its older kernel.
    if needs.phase is Phase.DECODE or Feature.FP8_KV in needs.all_features:
        return ("TRITON_ATTN", "FLASHINFER", "FLASH_ATTN", *others)
    has_fa3 = "flash_attn_3" in platform.packages or "vllm_flash_attn" in platform.packages
    if has_fa3 and needs.spec.sliding_window is None:
        return ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", *others)
    return ("FLASHINFER", "TRITON_ATTN", "FLASH_ATTN", *others)


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
