"""Which of FlashInfer's kernels run what, and what none of them can: plain rules, known without the library."""

from __future__ import annotations

import math

import torch

from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionNeeds, AttentionSpec, AttentionType, Feature

XQA_BLOCK_SIZES = (16, 32, 64, 128)
_XQA_MAJORS = (9, 10, 12)
_XQA_MAX_GROUP = 32
_CUDA_CORE_GROUPS = (1, 2, 3, 4)
_CASCADE_MIN_SEQS = 8
_CASCADE_MIN_PREFIX = 256
_CASCADE_MIN_TOKENS = 1 << 17


def prefill_kernel(capability: tuple[int, int], spec: AttentionSpec, masked: bool) -> str:
    """ "fa3", FlashAttention 3's scheme for Hopper, where it can do what is asked, else "fa2", which can do everything.

    Args:
        capability: of the device.
        spec: the layers.
        masked: whether the batch brings a mask.
    """
    asks_more = masked or spec.alibi_slopes is not None or spec.fp8_cache
    return "fa3" if capability[0] == 9 and not asks_more else "fa2"


def xqa_fits(capability: tuple[int, int], spec: AttentionSpec, block_size: int) -> bool:
    """Whether TensorRT-LLM's XQA kernel, which needs no plan, can decode these layers.

    Not with an FP8 cache: on Hopper it rounds queries and probabilities to FP8 too, which puts the output 4 % off.
    """
    return (
        capability[0] in _XQA_MAJORS
        and block_size in XQA_BLOCK_SIZES
        and spec.num_heads // spec.num_kv_heads <= _XQA_MAX_GROUP
        and spec.logits_soft_cap is None
        and spec.alibi_slopes is None
        and not spec.fp8_cache
    )


def decodes_on_cuda_cores(spec: AttentionSpec) -> bool:
    """Whether decode without XQA is faster, or possible, on CUDA cores: few query heads share a key."""
    return spec.num_heads // spec.num_kv_heads in _CUDA_CORE_GROUPS and not spec.fp8_cache


def cascade_pays(common: CommonAttentionMetadata, spec: AttentionSpec, xqa: bool) -> bool:
    """Whether attending to a common prefix once for all sequences saves more than merging costs.

    Never with a sliding window or ALiBi, whose scores depend on where in its sequence a query is, nor with masks.

    Args:
        common: the batch.
        spec: the layers.
        xqa: whether XQA could run the batch otherwise: it reads the cache so fast that a prefix must be many times
            longer than what the sequences have of their own.
    """
    plain = spec.sliding_window is None and spec.alibi_slopes is None and spec.attn_type is AttentionType.DECODER
    prefix = common.common_prefix_len
    if not plain or common.features or common.num_seqs < _CASCADE_MIN_SEQS or prefix < _CASCADE_MIN_PREFIX:
        return False
    if not xqa:
        return True
    read_again = (common.num_seqs - 1) * prefix
    own = sum(common.context_lens) - common.num_seqs * prefix
    return read_again >= _CASCADE_MIN_TOKENS and read_again >= 2 * own


def paper_slopes(num_heads: int) -> tuple[float, ...]:
    """The ALiBi slopes of the paper (arXiv:2108.12409): the only ones that FlashInfer's kernels know."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 / power * (i + 1)) for i in range(power)]
    more = [2.0 ** (-4.0 / power * (2 * i + 1)) for i in range(num_heads - power)]
    return (*slopes, *more)


def refuse_combinations(needs: AttentionNeeds) -> list[str]:
    """What FlashInfer's kernels can do one by one and not together."""
    spec, features = needs.spec, needs.all_features
    reasons = []
    if spec.alibi_slopes is not None:
        reasons += _refuse_alibi(spec, features)
    if spec.sliding_window is not None and not spec.causal:
        reasons.append("FlashInfer's sliding windows look back only, and this layer looks ahead too")
    return reasons


def _refuse_alibi(spec: AttentionSpec, features: frozenset[Feature]) -> list[str]:
    reasons = []
    slopes = spec.alibi_slopes or ()
    wanted = paper_slopes(max(1, spec.num_heads))
    if len(slopes) != len(wanted) or any(
        not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(slopes, wanted, strict=True)
    ):
        reasons.append(f"FlashInfer's kernels know only the ALiBi slopes of the paper for {spec.num_heads} heads")
    if Feature.SOFT_CAP in features:
        reasons.append("FlashInfer caps scores after adding ALiBi's bias, not before")
    if Feature.SINKS in features:
        reasons.append("FlashInfer shifts a row's scores with ALiBi, which sinks cannot bear")
    if Feature.NON_CAUSAL in features or features & {Feature.TREE_MASK, Feature.CUSTOM_MASK}:
        reasons.append("FlashInfer's ALiBi is for keys before the query only")
    return reasons


def window_left(spec: AttentionSpec) -> int:
    """A sliding window as FlashInfer counts it: keys before the query; -1 for all."""
    return -1 if spec.sliding_window is None else spec.sliding_window - 1


def kv_dtype(spec: AttentionSpec, dtype: torch.dtype) -> torch.dtype:
    """What the cache holds."""
    return spec.kv_cache_dtype or dtype
