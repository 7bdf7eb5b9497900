"""Prefill of latent attention over keys and values that were expanded from latents."""

from __future__ import annotations

import torch
import triton

from attention.errors import AttentionInputError
from attention.ops.triton.latent.prefill_kernel import latent_prefill_kernel
from attention.ops.triton.latent.tiles import prefill_tile
from attention.ops.triton.launch import (
    check_device,
    check_indices,
    check_logits,
    check_span,
    device_traits,
    dot_dtype,
    on_device,
)


def latent_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    rotary_key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_query_len: int,
    output: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    lse: torch.Tensor | None = None,
) -> None:
    """Attend from packed queries to packed keys, aligned at the lower right corner. Waits for no device.

    The score of a key is `scale * (q[:D]·key + q[D:]·rotary_key)`.

    Args:
        query: (T, Hq, D + P) fp16, bf16 or fp32.
        key: (S, Hq, D), of the query's dtype; may be a view of wider heads.
        rotary_key: (S, P), of all heads.
        value: (S, Hq, V); may be a view of wider heads.
        cu_seqlens_q: (B + 1,) int32.
        cu_seqlens_k: (B + 1,) int32.
        max_query_len: of the longest sequence.
        output: (T, Hq, V), written; zeros where a query sees no key.
        scale: multiplies the products, positive.
        causal: whether a query is kept from the keys behind it.
        lse: (T, Hq) fp32, written: the natural logarithm of each softmax's denominator, -inf where no key is seen.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    tokens, num_heads, _ = query.shape
    head_size, rotary, value_size = key.shape[2], rotary_key.shape[1], value.shape[2]
    shapes = (query.shape[2], key.shape[:2], value.shape[:2], (rotary_key.shape[0], num_heads), output.shape)
    keys = (key.shape[0], num_heads)
    if shapes != (head_size + rotary, keys, keys, keys, (tokens, num_heads, value_size)):
        raise AttentionInputError(
            f"queries of shape {tuple(query.shape)}, keys of {tuple(key.shape)} and {tuple(rotary_key.shape)}, values "
            f"of {tuple(value.shape)}, output of {tuple(output.shape)}"
        )
    if any(tensor.stride(-1) != 1 for tensor in (query, key, rotary_key, value, output)):
        raise AttentionInputError("the elements of a head must be contiguous")
    check_logits(scale, None, None)
    check_indices(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_span("a token's queries", query, 2)
    check_device(query)
    if tokens == 0:
        return
    batch = cu_seqlens_q.shape[0] - 1
    padded = [max(16, triton.next_power_of_2(size)) for size in (head_size, rotary, value_size)]
    traits = device_traits(query.device)
    tile = prefill_tile(
        max_query_len, batch * num_heads, padded[0] + padded[1], padded[2], query.element_size(), traits
    )
    with on_device(query):
        latent_prefill_kernel[(triton.cdiv(max_query_len, tile.rows), num_heads, batch)](
            output, lse, query, key, rotary_key, value, cu_seqlens_q, cu_seqlens_k, scale,
            *query.stride()[:2], *key.stride()[:2], rotary_key.stride(0), *value.stride()[:2], *output.stride()[:2],
            *((0, 0) if lse is None else lse.stride()),
            D=head_size, D_PAD=padded[0], P=rotary, P_PAD=padded[1], V=value_size, V_PAD=padded[2],
            BLOCK_M=tile.rows, BLOCK_N=tile.keys, DOT_DTYPE=dot_dtype(query.dtype, query.dtype), CAUSAL=causal,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
