"""FlashAttention's packages as they are written: the real signatures of their functions, answers computed in torch."""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from attention.backends.flash_attn.fa4 import INNER, MODULE
from attention.spec import AttentionSpec, AttentionType
from attention_reference import attend, visible_keys
from fake_kernels import module, recorded


def _compute(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashAttention's functions promise: outputs, and logarithms of denominators of shape (Hq, T)."""
    left, right = (-1 if side is None else side for side in a.window_size)
    both_ways = AttentionType.ENCODER_DECODER if left < 0 else AttentionType.ENCODER
    spec = AttentionSpec(
        a.q.shape[1],
        a.k.shape[-2],
        a.q.shape[2],
        a.softmax_scale,
        sliding_window=None if left < 0 else left + 1,
        logits_soft_cap=a.softcap or None,
        attn_type=AttentionType.DECODER if a.causal else both_ways,
    )
    assert (left, right) in ((-1, -1), (left, 0 if a.causal else left))
    queries = a.cu_seqlens_q.tolist()
    lens = a.seqused_k.tolist() if a.seqused_k is not None else a.cu_seqlens_k.diff().tolist()
    begins = [0, *itertools.accumulate(lens)]
    outputs, lses = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(queries)):
        assert end - begin <= a.max_seqlen_q
        keys, values = a.k[begins[i] : begins[i + 1]], a.v[begins[i] : begins[i + 1]]
        if a.page_table is not None:
            keys, values = (t[a.page_table[i].long()].flatten(0, 1)[: lens[i]] for t in (a.k, a.v))
        seen = visible_keys(spec, end - begin, lens[i])
        # A sink of 0 scales the output by 1 - 1 / (exp(lse) + 1), so two runs give the logarithm.
        plain = attend(a.q[begin:end], keys, torch.ones_like(values), spec, seen, torch.zeros(spec.num_heads))[..., 0]
        outputs.append(attend(a.q[begin:end], keys, values, spec, seen, getattr(a, "learnable_sink", None)))
        lses.append(torch.logit(plain))
    return torch.cat(outputs).to(a.q.dtype), torch.cat(lses).T.float()


# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py.
@recorded(
    "(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, "
    "causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, "
    "aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, "
    "disable_scheduler_metadata=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None)"
)
def fa4_varlen(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, lse = _compute(a)
    return output, lse if a.return_lse else None


# flash-attn-3, hopper/flash_attn_interface.py.
@recorded(
    "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
    "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "sm_margin=0, return_attn_probs=False)"
)
def fa3_varlen(a: SimpleNamespace) -> Any:
    a.page_table = None
    output, lse = _compute(a)
    return (output, lse) if a.return_attn_probs else output


@recorded(
    "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False)"
)
def fa3_kvcache(a: SimpleNamespace) -> Any:
    assert a.k is None
    assert a.v is None
    a.k, a.v, a.seqused_k = a.k_cache, a.v_cache, a.cache_seqlens
    output, lse = _compute(a)
    return (output, lse, None, None) if a.return_softmax_lse else output


# vLLM 0.26, vllm/vllm_flash_attn/flash_attn_interface.py.
@recorded(
    "(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None, "
    "q_descale=None, k_descale=None, v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None, "
    "cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, mask_mod=None, aux_tensors=None, dynamic_causal=None)"
)
def vllm_varlen(a: SimpleNamespace) -> Any:
    assert (a.cu_seqlens_k is None) != (a.seqused_k is None)
    assert a.block_table is None or a.seqused_k is not None
    assert a.fa_version == 2 or a.alibi_slopes is None
    a.page_table = a.block_table
    output, lse = _compute(a)
    a.out.copy_(output)
    return (a.out, lse) if a.return_softmax_lse else a.out


# flash-attn 2.8, flash_attn/flash_attn_interface.py.
@recorded(
    "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None)"
)
def fa2_varlen(a: SimpleNamespace) -> Any:
    a.page_table, a.seqused_k = a.block_table, None
    output, lse = _compute(a)
    return (output, lse, None) if a.return_attn_probs else output


class AuxData(NamedTuple):
    """flash_attn.cute.utils."""

    tensors: Any = None
    scalars: Any = None


class CompiledForHopper:
    """A compiled kernel: takes the arguments of flash_fwd_sm90's `__call__` by their places, and counts launches.

    Attributes:
        causal: compiled in, as is the soft cap.
    """

    def __init__(self, causal: bool, soft_cap: float | None) -> None:
        self.causal, self.soft_cap, self.launches = causal, soft_cap, 0

    def __call__(self, *arguments: Any) -> None:
        """Attend, and write output and log-sum-exps."""
        (q, k, v, out, lse, scale, cu_q, cu_k, used_q, used_k, table, left, right, sink, sparse, aux, *hints) = (
            arguments
        )
        assert (used_q, sparse, aux, hints) == (None, None, AuxData(), [None, None])
        self.launches += 1
        output, found = _compute(
            SimpleNamespace(
                q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used_k, page_table=table,
                softmax_scale=scale, causal=self.causal or right == 0,
                window_size=(left, right), softcap=self.soft_cap, learnable_sink=sink, max_seqlen_q=len(q),
            )
        )  # fmt: skip
        out.copy_(output)
        if lse is not None:
            lse.copy_(found)


# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py, as it goes for SM 9.0.
_FORWARD = (
    "(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, "
    "window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, "
    "q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, "
    "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False)"
)


def flash_attn_4() -> ModuleType:
    """The module with the public function and the one behind it.

    The module's `forwards` counts calls of the function behind, and its `kernels` are those that were compiled.
    """

    @recorded(_FORWARD)
    def forward(a: SimpleNamespace) -> Any:
        library.forwards += 1
        assert a.num_splits == 1, "SplitKV not supported on SM 9.0"
        causal, left, right = a.causal, a.window_size_left, a.window_size_right
        if causal:
            right = 0
        if left is None and right == 0:
            causal, right = True, None
        elif left is not None or right is not None:
            causal = False
        out = torch.empty_like(a.q) if a.out is None else a.out
        assert out.data_ptr() % 16 == 0
        lse = a.lse
        if lse is None and a.return_lse:
            lse = torch.empty(a.q.shape[1], a.q.shape[0])
        key = (a.q.dtype, a.q.shape[2], causal, a.softcap, a.max_seqlen_q * 4 <= 128, a.page_table is None, lse is None)
        if key not in forward.compile_cache:
            forward.compile_cache[key] = CompiledForHopper(causal, a.softcap)
        forward.compile_cache[key](
            a.q.detach(), a.k.detach(), a.v.detach(), out.detach(), lse, a.softmax_scale, a.cu_seqlens_q,
            a.cu_seqlens_k, a.seqused_q, a.seqused_k, a.page_table, left, right, a.learnable_sink, None, AuxData(),
            None, None,
        )  # fmt: skip
        return out, lse, None, None, None

    kernels: dict[Any, CompiledForHopper] = {}
    forward.compile_cache = kernels  # type: ignore[attr-defined]
    functions = {"flash_attn_varlen_func": fa4_varlen, INNER: forward}
    library = module(MODULE, **functions, forwards=0, kernels=kernels)
    return library
