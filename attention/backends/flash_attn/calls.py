"""One call of varlen FlashAttention (arXiv:2205.14135), and what each package wants it to look like."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attention.backends.common.libraries import load_library

NAME = "FLASH_ATTN"


@dataclass(frozen=True)
class Call:
    """Attention of packed queries over packed or paged keys, aligned at the lower right corner.

    Attributes:
        query: (T, Hq, D).
        key: (S, Hkv, D); with `block_tables` (num_blocks, block_size, Hkv, D).
        value: of the same shape.
        output: (T, Hq, D), written.
        cu_seqlens_q: (B + 1,) int32.
        cu_seqlens_k: (B + 1,) int32, where each sequence's keys begin in S, or would without pages.
        max_query_len: of the longest sequence.
        max_seq_len: likewise, keys.
        seq_lens: (B,) int32, keys of each sequence; with `block_tables`.
        block_tables: (B, max_blocks) int32; None: keys are packed.
        scale: multiplies q·k.
        causal: whether a query is kept from the keys behind it.
        window: keys before and after it that a query sees, -1 for all.
        soft_cap: 0.0 for none.
        alibi_slopes: (Hq,) float32.
        sinks: (Hq,) float32, for packages that know them.
        wants_lse: whether the logarithm of the softmax's denominator is asked for.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_query_len: int
    max_seq_len: int
    seq_lens: torch.Tensor
    block_tables: torch.Tensor | None
    scale: float
    causal: bool
    window: tuple[int, int]
    soft_cap: float
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    wants_lse: bool


Kernel = Callable[[Call], torch.Tensor | None]
"""Runs a call; returns the natural logarithms of the softmaxes' denominators, (Hq, T) float32, where asked for."""


def flash_attn_3(call: Call) -> torch.Tensor | None:
    """FlashAttention 3 (arXiv:2407.08608), `flash_attn_interface` of flash-attn-3."""
    library = load_library("flash_attn_3", NAME)
    same = {
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size": call.window,
        "softcap": call.soft_cap,
    }
    if call.block_tables is None:
        attended = library.flash_attn_varlen_func(
            call.query,
            call.key,
            call.value,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_query_len,
            call.max_seq_len,
            return_attn_probs=call.wants_lse,
            **same,
        )
    else:
        attended = library.flash_attn_with_kvcache(
            call.query,
            call.key,
            call.value,
            cache_seqlens=call.seq_lens,
            page_table=call.block_tables,
            cu_seqlens_q=call.cu_seqlens_q,
            max_seqlen_q=call.max_query_len,
            return_softmax_lse=call.wants_lse,
            **same,
        )
    output, lse = attended[:2] if isinstance(attended, tuple) else (attended, None)
    call.output.copy_(output)
    return _lse(lse, call)


def vllm_flash_attn(version: int, call: Call) -> torch.Tensor | None:
    """FlashAttention 2 or 3 as vLLM builds it."""
    library = load_library("vllm_flash_attn", NAME)
    attended = library.flash_attn_varlen_func(
        call.query,
        call.key,
        call.value,
        call.max_query_len,
        call.cu_seqlens_q,
        call.max_seq_len,
        cu_seqlens_k=None if call.block_tables is not None else call.cu_seqlens_k,
        seqused_k=call.seq_lens if call.block_tables is not None else None,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=list(call.window),
        softcap=call.soft_cap,
        alibi_slopes=call.alibi_slopes,
        block_table=call.block_tables,
        return_softmax_lse=call.wants_lse,
        out=call.output,
        fa_version=version,
        s_aux=call.sinks,
    )
    return _lse(attended[1], call) if call.wants_lse else None


def flash_attn_2(call: Call) -> torch.Tensor | None:
    """FlashAttention 2 (arXiv:2307.08691), `flash_attn`."""
    library = load_library("flash_attn", NAME)
    attended = library.flash_attn_varlen_func(
        call.query,
        call.key,
        call.value,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_query_len,
        call.max_seq_len,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=call.window,
        softcap=call.soft_cap,
        alibi_slopes=call.alibi_slopes,
        return_attn_probs=call.wants_lse,
        block_table=call.block_tables,
    )
    output, lse = attended[:2] if isinstance(attended, tuple) else (attended, None)
    call.output.copy_(output)
    return _lse(lse, call)


def torch_flash_attention(call: Call) -> torch.Tensor | None:
    """PyTorch's own operator, FlashAttention 2; `torch.nn.attention.varlen` calls the same one, without ALiBi."""
    more: dict[str, Any] = {}
    if call.block_tables is not None:
        more = {"seqused_k": call.seq_lens, "block_table": call.block_tables}
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        call.query,
        call.key,
        call.value,
        call.cu_seqlens_q,
        None if call.block_tables is not None else call.cu_seqlens_k,
        call.max_query_len,
        call.max_seq_len,
        0.0,
        call.causal and call.window == (-1, -1),
        False,
        scale=call.scale,
        window_size_left=call.window[0] if call.window != (-1, -1) else None,
        window_size_right=call.window[1] if call.window != (-1, -1) else None,
        alibi_slopes=call.alibi_slopes,
        **more,
    )
    call.output.copy_(output)
    return _lse(lse, call)


@functools.cache
def torch_takes_block_tables() -> bool:
    """Whether PyTorch's operator reads keys and values through block tables."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return any(argument.name == "block_table" for argument in schema.arguments)


def _lse(lse: torch.Tensor | None, call: Call) -> torch.Tensor | None:
    return lse if call.wants_lse else None
