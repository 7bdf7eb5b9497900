"""Decode of latent attention over a paged cache of latents: one query token per sequence.

On a Hopper GPU many heads have a kernel of their own (`latent.hopper`), and few (`latent.few_heads`); all else has
`latent.decode_kernel`'s.
"""

from __future__ import annotations

import torch
import triton

from attention.errors import AttentionInputError
from attention.ops.triton.decode_kernel import reduce_kernel
from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.latent import few_heads, hopper
from attention.ops.triton.latent.decode_kernel import latent_decode_kernel
from attention.ops.triton.latent.tiles import choose_splits, decode_places, decode_tile
from attention.ops.triton.launch import (
    check_device,
    check_indices,
    check_logits,
    check_span,
    device_traits,
    dot_dtype,
    kernel_view,
    on_device,
)
from attention.ops.triton.split_parts import make_parts
from attention.ops.triton.tuning import MAX_SPLITS, MIN_TILES, Tile, check_splits, given_splits


def latent_decode(
    query: torch.Tensor,
    rotary_query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    output: torch.Tensor,
    *,
    scale: float,
    cache_scale: float = 1.0,
    lse: torch.Tensor | None = None,
    num_splits: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Attend from each sequence's last token over its latents, in which its own lies already.

    The score of a cached token is `scale * (query·latent + rotary_query·rotary key)`, and the output of a head the
    latents' weighted sum. A sequence without tokens (a padding row of a captured graph) gives zeros. Nothing here waits
    for the device: it can be captured in a CUDA graph, which then serves sequences of any length up to what its block
    tables hold.

    Args:
        query: (B, Hq, R) fp16, bf16 or fp32, in the latents' space.
        rotary_query: (B, Hq, P) of the same dtype.
        kv_cache: (num_blocks, block_size, R + P), of the query's dtype or float8_e4m3fn; blocks of a power of two.
        block_tables: (B, max_blocks) int32.
        seq_lens: (B,) int32, tokens of each sequence, the query's included.
        max_seq_len: the longest sequence; used only to choose the number of splits.
        output: (B, Hq, R), written.
        scale: multiplies the products, positive.
        cache_scale: what stored numbers are multiplied with.
        lse: (B, Hq) fp32, written: the natural logarithm of each softmax's denominator, -inf without tokens.
        num_splits: programs that share a sequence's tokens; 1 writes the output at once, more need a second kernel.
            None chooses by the batch and the device.
        tile: of the kernel, for benchmarks; None chooses it.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    _check(query, rotary_query, kv_cache, output)
    check_logits(scale, None, None)
    check_indices(block_tables=block_tables, seq_lens=seq_lens)
    check_splits(num_splits)
    batch, num_heads, rank = query.shape
    rotary = rotary_query.shape[2]
    if batch == 0:
        return
    cache = kernel_view(kv_cache)
    traits = device_traits(query.device)
    rank_padded, rotary_padded = (max(16, triton.next_power_of_2(size)) for size in (rank, rotary))
    itemsize, latent_size = query.element_size(), rank_padded + rotary_padded
    of_many = tile is None and hopper.serves(query, rotary_query, cache, traits)
    of_few = tile is None and few_heads.serves(query, rotary_query, cache, traits)
    if of_many:
        tile = hopper.TILE
    elif of_few:
        tile = few_heads.tile_of(cache)
    elif tile is None:
        tile = decode_tile(num_heads, latent_size, itemsize, cache.element_size(), traits)
    head_tiles = triton.cdiv(num_heads, tile.rows)
    min_tiles, most_splits = MIN_TILES, MAX_SPLITS
    if of_few:
        min_tiles = few_heads.fewest_keys(batch, cache.element_size(), traits) // tile.keys
        most_splits, places = few_heads.MOST_SPLITS, few_heads.places(traits)
    else:
        places = decode_places(tile, latent_size, itemsize, traits)
    if num_splits is None:
        splits = choose_splits(batch * head_tiles, max_seq_len, tile, places, min_tiles, most_splits)
    else:
        splits = given_splits(num_splits)
    partial, partial_lse = make_parts(batch, num_heads, splits.count, rank, query.device)
    dealing = (splits.count, splits.wanted, splits.most_tiles)
    lse_strides = (0, 0) if lse is None else lse.stride()
    with on_device(query):
        grid = (head_tiles, splits.count, batch)
        outputs, queries = (output, lse, partial, partial_lse), (query, rotary_query)
        numbers = (scale * cache_scale, cache_scale, *dealing)
        strides = (
            *query.stride()[:2], *rotary_query.stride()[:2], *output.stride()[:2], *lse_strides, block_tables.stride(0)
        )  # fmt: skip
        sizes = {"NUM_HEADS": num_heads, "R": rank, "P": rotary, "BLOCK_SIZE": kv_cache.shape[1]}
        dependent = dependent_launch(query.device, head_tiles * splits.count * batch)
        if of_many:
            from attention.ops.triton.latent.hopper_kernel import hopper_latent_decode_kernel

            hopper_latent_decode_kernel[grid](
                *outputs, *queries, *hopper.cache_tiles(cache), block_tables, seq_lens, *numbers, *strides,
                **sizes, MIN_TILES=min_tiles, num_warps=tile.num_warps, **dependent,
            )  # fmt: skip
        elif of_few:
            from attention.ops.triton.latent.few_heads_kernel import few_heads_latent_decode_kernel

            words = cache.view(torch.int16)
            few_heads_latent_decode_kernel[grid](
                *outputs, *queries, words, block_tables, seq_lens, *numbers, *strides, *words.stride()[:2],
                **sizes, KEYS=tile.keys, STAGES=tile.num_stages, MIN_TILES=min_tiles, FP8=cache.element_size() == 1,
                num_warps=tile.num_warps, **dependent,
            )  # fmt: skip
        else:
            latent_decode_kernel[grid](
                *outputs, *queries, cache, block_tables, seq_lens, *numbers, *strides, *cache.stride()[:2],
                **sizes, R_PAD=rank_padded, P_PAD=rotary_padded, BLOCK_M=tile.rows, BLOCK_N=tile.keys,
                MIN_TILES=min_tiles, DOT_DTYPE=dot_dtype(query.dtype, kv_cache.dtype), num_warps=tile.num_warps,
                num_stages=tile.num_stages, **dependent,
            )  # fmt: skip
        if splits.count > 1:
            reduce_kernel[(num_heads, batch)](
                output, lse, partial, partial_lse, seq_lens, None, *dealing, *output.stride()[:2], *lse_strides,
                NUM_HEADS=num_heads, D=rank, D_PAD=rank_padded, BLOCK_N=tile.keys, MIN_TILES=min_tiles,
                SPLITS_PAD=triton.next_power_of_2(splits.count), num_warps=_reduce_warps(splits.count, rank_padded),
                **dependent_launch(query.device, num_heads * batch),
            )  # fmt: skip


def _reduce_warps(num_splits: int, rank_padded: int) -> int:
    """Warps that have all partial results of a head in registers, at most 64 numbers a thread."""
    return min(max(int(triton.next_power_of_2(num_splits)) * rank_padded // (32 * 64), 4), 16)


def _check(query: torch.Tensor, rotary_query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
    if query.ndim != 3 or rotary_query.ndim != 3 or query.shape[:2] != rotary_query.shape[:2]:
        raise AttentionInputError(
            f"queries of shape {tuple(query.shape)} and rotary queries of {tuple(rotary_query.shape)}: needs "
            "(sequences, heads, latent size) and (sequences, heads, rotary size)"
        )
    size = query.shape[2] + rotary_query.shape[2]
    if kv_cache.ndim != 3 or kv_cache.shape[2] != size or kv_cache.stride(2) != 1:
        raise AttentionInputError(
            f"a cache of shape {tuple(kv_cache.shape)} with strides {kv_cache.stride()} for latents of {size}: needs "
            "(blocks, block size, latent size), the elements of a token contiguous"
        )
    block_size = kv_cache.shape[1]
    if block_size & (block_size - 1):
        raise AttentionInputError(f"block size {block_size} is not a power of two")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or rotary_query.dtype != query.dtype:
        raise AttentionInputError(f"queries are fp16, bf16 or fp32, not {query.dtype} and {rotary_query.dtype}")
    if output.shape != query.shape:
        raise AttentionInputError(f"output of shape {tuple(output.shape)} for queries of {tuple(query.shape)}")
    if any(tensor.stride(2) != 1 for tensor in (query, rotary_query, output)):
        raise AttentionInputError("the elements of a head of queries and output must be contiguous")
    check_span("a block of the cache", kv_cache, 2)
    check_device(query)
