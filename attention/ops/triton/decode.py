"""Decode attention over a paged cache: one query token per sequence."""

from __future__ import annotations

import torch
import triton

from attention.ops.triton import staying_decode
from attention.ops.triton.decode_kernel import decode_kernel, reduce_kernel
from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import (
    check_cache,
    check_heads,
    check_indices,
    check_logits,
    device_traits,
    dot_dtype,
    kernel_view,
    on_device,
)
from attention.ops.triton.split_parts import make_parts
from attention.ops.triton.tuning import MIN_TILES, check_splits, choose_splits, decode_tile, given_splits


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    output: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    lse: torch.Tensor | None = None,
    num_splits: int | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Attend from each sequence's last token over its paged cache, in which its own key and value lie already.

    A sequence of no keys (a padding row of a captured graph) gives zeros. Nothing here waits for the device: it can be
    captured in a CUDA graph, which then serves sequences of any length up to what its block tables hold.

    Args:
        query: (B, Hq, D) fp16, bf16 or fp32.
        kv_cache: (num_blocks, 2, block_size, Hkv, D), of the query's dtype or float8_e4m3fn.
        block_tables: (B, max_blocks) int32.
        seq_lens: (B,) int32, keys of each sequence, the query's included.
        max_seq_len: the longest sequence; used only to choose the number of splits.
        output: (B, Hq, D), written.
        scale: multiplies q·k, positive.
        sliding_window: only the last so many keys are seen.
        soft_cap: logits become `cap * tanh(logit / cap)`.
        alibi_slopes: (Hq,) fp32; `-slope * |i - j|` is added to a logit.
        sinks: (Hq,) fp32, one more logit of each head, without a value.
        k_scale: what stored keys are multiplied with.
        v_scale: what stored values are multiplied with.
        lse: (B, Hq) fp32, written: the natural logarithm of each softmax's denominator, -inf where no key is seen.
        num_splits: programs that share a sequence's keys; 1 writes the output at once, more need a second kernel.
            None chooses by the batch and the device.
        counters: int32, B * Hkv or more zeros that no other call uses at the same time; all zero again afterwards. With
            them, Hopper GPUs compute plain attention by `staying_decode`'s kernel.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    check_cache(kv_cache)
    num_kv_heads, head_size = kv_cache.shape[3:]
    check_heads(query, output, num_kv_heads, head_size)
    check_logits(scale, soft_cap, sliding_window)
    check_indices(block_tables=block_tables, seq_lens=seq_lens)
    check_splits(num_splits)
    batch, num_heads, _ = query.shape
    if batch == 0:
        return
    cache = kernel_view(kv_cache)
    traits = device_traits(query.device)
    plain = sliding_window is None and soft_cap is None and alibi_slopes is None and sinks is None
    if plain and counters is not None and staying_decode.serves(query, cache, traits):
        staying_decode.launch_staying_decode(
            query, cache, block_tables, seq_lens, max_seq_len, output, counters, scale * k_scale, v_scale, lse,
            num_splits,
        )  # fmt: skip
        return
    group = num_heads // num_kv_heads
    head_size_padded = max(16, triton.next_power_of_2(head_size))
    tile = decode_tile(
        triton.next_power_of_2(group), head_size_padded, query.element_size(), cache.element_size(), traits
    )
    head_tiles = num_kv_heads * -(-group // tile.rows)
    if num_splits is None:
        longest = max_seq_len if sliding_window is None else min(max_seq_len, sliding_window)
        splits = choose_splits(batch * head_tiles, longest, tile, traits)
    else:
        splits = given_splits(num_splits)
    partial, partial_lse = make_parts(batch, num_heads, splits.count, head_size, query.device)
    dealing = (splits.count, splits.wanted, splits.most_tiles)
    lse_strides = (0, 0) if lse is None else lse.stride()
    with on_device(query):
        decode_kernel[(head_tiles, splits.count, batch)](
            output, lse, partial, partial_lse, query, cache[:, 0], cache[:, 1], block_tables, seq_lens,
            alibi_slopes, sinks, scale * k_scale, v_scale, soft_cap, sliding_window, *dealing,
            query.stride(0), query.stride(1), output.stride(0), output.stride(1), *lse_strides,
            block_tables.stride(0), kv_cache.stride(0), kv_cache.stride(2), kv_cache.stride(3),
            NUM_HEADS=num_heads, GROUP=group, D=head_size, D_PAD=head_size_padded, BLOCK_SIZE=kv_cache.shape[2],
            BLOCK_M=tile.rows, BLOCK_N=tile.keys, MIN_TILES=MIN_TILES, DOT_DTYPE=dot_dtype(query.dtype, kv_cache.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            **dependent_launch(query.device, head_tiles * splits.count * batch),
        )  # fmt: skip
        if splits.count > 1:
            reduce_kernel[(num_heads, batch)](
                output, lse, partial, partial_lse, seq_lens, sliding_window, *dealing,
                output.stride(0), output.stride(1), *lse_strides,
                NUM_HEADS=num_heads, D=head_size, D_PAD=head_size_padded, BLOCK_N=tile.keys, MIN_TILES=MIN_TILES,
                SPLITS_PAD=triton.next_power_of_2(splits.count), num_warps=4,
                **dependent_launch(query.device, num_heads * batch),
            )  # fmt: skip
