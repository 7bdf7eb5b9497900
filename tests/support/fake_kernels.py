"""Kernel libraries of hardware that is not here: their functions' real signatures, and answers computed in torch.

A call is bound to the recorded signature before anything is computed, so that an adapter that passes a name or a number
of arguments that the library does not take fails as it would there.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from attention.spec import AttentionSpec
from attention_reference import attend, visible_keys


def recorded(signature: str) -> Callable[[Callable[[SimpleNamespace], Any]], Callable[..., Any]]:
    """Give a function of bound arguments the signature of a library's function."""
    namespace: dict[str, Any] = {}
    exec(f"def stub{signature}: ...", namespace)
    real = inspect.signature(namespace["stub"])

    def decorate(compute: Callable[[SimpleNamespace], Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = real.bind(*args, **kwargs)
            bound.apply_defaults()
            return compute(SimpleNamespace(**bound.arguments))

        call.__signature__ = real  # type: ignore[attr-defined]
        return call

    return decorate


def module(name: str, **functions: Any) -> ModuleType:
    """A module with these functions."""
    made = ModuleType(name)
    for key, value in functions.items():
        setattr(made, key, value)
    return made


def _spec(query: torch.Tensor, kv_heads: int, scale: float, window: int | None, **more: Any) -> AttentionSpec:
    return AttentionSpec(query.shape[1], kv_heads, query.shape[2], scale, sliding_window=window, **more)


def _slopes(tensor: torch.Tensor | None) -> tuple[float, ...] | None:
    return None if tensor is None else tuple(tensor.tolist())


def _varlen(a: SimpleNamespace, soft_cap: float | None = None) -> torch.Tensor:
    """FlashAttention's varlen contract: packed, causal and windows aligned at the lower right corner."""
    assert a.q.dtype == a.k.dtype == a.v.dtype
    assert a.cu_seqlens_q.dtype == a.cu_seqlens_k.dtype == torch.int32
    assert a.causal
    left, right = a.window_size[:2]
    assert (left, right) == (-1, -1) or right == 0
    window = None if left < 0 else left + 1
    spec = _spec(
        a.q, a.k.shape[1], a.softmax_scale, window, logits_soft_cap=soft_cap, alibi_slopes=_slopes(a.alibi_slopes)
    )
    begins_q, begins_k = a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist()
    assert (begins_q[-1], begins_k[-1]) == (len(a.q), len(a.k))
    pieces = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(begins_q), itertools.pairwise(begins_k), strict=True):
        assert q1 - q0 <= a.max_seqlen_q
        assert k1 - k0 <= a.max_seqlen_k
        pieces.append(attend(a.q[q0:q1], a.k[k0:k1], a.v[k0:k1], spec, visible_keys(spec, q1 - q0, k1 - k0)))
    return torch.cat(pieces).to(a.q.dtype)


# flash_attn 2.8, flash_attn/flash_attn_interface.py; on ROCm its kernels are Composable Kernel's, without soft cap.
@recorded(
    "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None)"
)
def flash_attn_varlen_func(a: SimpleNamespace) -> torch.Tensor:
    """The `flash_attn` package's."""
    assert (a.dropout_p, a.softcap, a.return_attn_probs, a.block_table) == (0.0, 0.0, False, None)
    return _varlen(a)


# ROCm/aiter, aiter/ops/mha.py.
@recorded(
    "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, min_seqlen_q=0, dropout_p=0.0, "
    "softmax_scale=None, logits_soft_cap=0.0, causal=False, window_size=(-1, -1, 0), bias=None, alibi_slopes=None, "
    "deterministic=False, return_lse=False, return_attn_probs=False, how_v3_bf16_cvt=1, block_table=None, out=None, "
    "cu_seqlens_q_padded=None, cu_seqlens_k_padded=None)"
)
def aiter_flash_attn_varlen_func(a: SimpleNamespace) -> torch.Tensor:
    """aiter's; a tensor, not a tuple, where neither log-sum-exps nor weights are asked for."""
    assert (a.dropout_p, a.return_lse, a.return_attn_probs, a.block_table, a.bias) == (0.0, False, False, None, None)
    attended = _varlen(a, a.logits_soft_cap or None)
    return attended if a.out is None else a.out.copy_(attended)


# ROCm/aiter, aiter/ops/attention.py; what the kernel reads and skips: csrc/cpp_itfs/pa/pa_v1.cuh.
@recorded(
    "(out, workspace_buffer, query, key_cache, value_cache, scale, block_tables, cu_query_lens, context_lens, "
    "max_context_len, alibi_slopes, kv_cache_dtype, kv_cache_layout, logits_soft_cap, k_scale, v_scale, "
    "fp8_out_scale=None, partition_size=256, mtp=1, sliding_window=0)"
)
def aiter_paged_attention_v1(a: SimpleNamespace) -> torch.Tensor:
    """aiter's; sequences with more than one query are skipped, and their rows of `out` not written."""
    assert (a.kv_cache_dtype, a.kv_cache_layout, a.fp8_out_scale) == ("auto", "NHD", None)
    assert (a.partition_size, a.mtp, a.sliding_window) == (256, 1, 0)
    assert a.out.is_contiguous()
    assert a.query.stride() == a.out.stride()
    assert a.block_tables.is_contiguous()
    assert a.block_tables.dtype == a.cu_query_lens.dtype == a.context_lens.dtype == torch.int32
    assert a.key_cache.stride() == a.value_cache.stride()
    assert a.k_scale.dtype == a.v_scale.dtype == torch.float32
    sequences, heads, size = a.block_tables.shape[0], *a.query.shape[1:]
    partials = sequences * heads * -(-a.max_context_len // 256)
    assert a.workspace_buffer.dtype == torch.uint8
    assert a.workspace_buffer.numel() >= partials * (size * a.query.element_size() + 8)
    spec = _spec(
        a.query, a.key_cache.shape[2], a.scale, None,
        logits_soft_cap=a.logits_soft_cap or None, alibi_slopes=_slopes(a.alibi_slopes),
    )  # fmt: skip
    begins = a.cu_query_lens.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(begins)):
        if end - begin > 1:
            continue
        length = int(a.context_lens[i])
        assert length <= a.max_context_len
        keys, values = (_paged(cache, a.block_tables[i], length) for cache in (a.key_cache, a.value_cache))
        a.out[begin:end] = attend(a.query[begin:end], keys, values, spec, visible_keys(spec, 1, length)).to(a.out.dtype)
    return a.out


# intel/intel-extension-for-pytorch, release/xpu/2.8: transformers/models/xpu/fusions/mha_fusion.py, reached through
# llm/modules/mha_fusion.py, and csrc/gpu/aten/operators/xetla/kernels/SDP/blocked_attention_kernel.hpp.
@recorded(
    "(output, query, k_cache, v_cache, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, is_causal, "
    "block_table, alibi_slopes=None, window_size_left=-1, window_size_right=-1, kv_cache_dtype='auto', k_scale=1.0, "
    "v_scale=1.0, softcap=-1.0)"
)
def ipex_flash_attn_varlen_func(a: SimpleNamespace) -> None:
    """Intel's; both caches are read as rows of one contiguous matrix, block after block."""
    assert a.is_causal
    assert a.alibi_slopes is None
    assert a.output.is_contiguous()
    assert a.query.is_contiguous()
    assert a.k_cache.is_contiguous()
    assert a.v_cache.is_contiguous()
    assert a.cu_seqlens_q.dtype == a.cu_seqlens_kv.dtype == a.block_table.dtype == torch.int32
    assert a.window_size_right == (-1 if a.window_size_left < 0 else 0)
    window = None if a.window_size_left < 0 else a.window_size_left + 1
    soft_cap = a.softcap if a.softcap > 0 else None
    spec = _spec(a.query, a.k_cache.shape[2], a.scale, window, logits_soft_cap=soft_cap)
    begins_q, begins_k = a.cu_seqlens_q.tolist(), a.cu_seqlens_kv.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(begins_q)):
        length = begins_k[i + 1] - begins_k[i]
        assert end - begin <= a.max_seqlen_q
        assert length <= a.max_seqlen_kv
        keys, values = (_paged(cache, a.block_table[i], length) for cache in (a.k_cache, a.v_cache))
        seen = visible_keys(spec, end - begin, length)
        a.output[begin:end] = attend(a.query[begin:end], keys, values, spec, seen).to(a.output.dtype)


def _paged(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """(length, Hkv, D) of one sequence out of a cache (blocks, block_size, Hkv, D)."""
    used = -(-length // cache.shape[1])
    return cache[table[:used].long()].flatten(0, 1)[:length]
