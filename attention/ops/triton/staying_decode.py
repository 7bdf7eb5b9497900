"""Decode by programs that stay, on Hopper GPUs: where they serve, and how sequences are dealt out to them."""

from __future__ import annotations

import torch
import triton

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import DeviceTraits, compiles_gluon, copies_rows, device_traits, on_device
from attention.ops.triton.split_parts import MOST_COUNTED, make_parts
from attention.ops.triton.tuning import MAX_SPLIT_KEYS, MAX_SPLITS, MIN_TILES, Splits, given_splits

KEYS = 64
"""Of a tile."""
_STAGES = 3
_PROGRAMS = 2
"""Of a multiprocessor: what its shared memory holds."""
_HEAD_SIZES = (64, 128)
_MOST_HEADS = 16
"""Query heads of a KV head."""
_FEWEST_PADDED = 32
_MIN_TILES_OF_MANY = 16
_FULL = 0.85
"""The share of a device's places that is as good as all."""


def serves(query: torch.Tensor, kv_cache: torch.Tensor, traits: DeviceTraits) -> bool:
    """Whether the kernel computes plain attention of these: 16 bits, heads of 64 or 128, blocks of multiples of 64.

    Args:
        query: (B, Hq, D).
        kv_cache: (num_blocks, 2, block_size, Hkv, D).
        traits: the device.
    """
    batch, num_heads, head_size = query.shape
    return (
        compiles_gluon(traits)
        and query.dtype in (torch.bfloat16, torch.float16)
        and kv_cache.dtype == query.dtype
        and head_size in _HEAD_SIZES
        and num_heads // kv_cache.shape[3] <= _MOST_HEADS
        and kv_cache.shape[2] % KEYS == 0
        and batch <= MOST_COUNTED
        and copies_rows(kv_cache)
    )


def deal(num_pairs: int, max_seq_len: int, num_sms: int) -> tuple[Splits, int]:
    """Splits after which every multiprocessor has two pieces, and few have one more than others.

    One piece at a time keeps a multiprocessor reading, but programs that are placed while the kernel ahead ends lie two
    on one and none on another: only of two each is none idle. Where there is a piece for each without splits, only long
    sequences are split: to put pieces together takes longer than the last ones are waited for.

    Args:
        num_pairs: sequences times KV heads.
        max_seq_len: keys of the longest sequence.
        num_sms: multiprocessors.

    Returns:
        Splits, and how many tiles of keys are worth a piece.
    """
    min_tiles = MIN_TILES if num_pairs < _FULL * num_sms else _MIN_TILES_OF_MANY
    useful = max(1, min(-(-max_seq_len // (KEYS * min_tiles)), MAX_SPLITS))

    def used(splits: int) -> float:
        pieces = num_pairs * splits
        return pieces / (num_sms * max(_PROGRAMS, -(-pieces // num_sms)))

    every = range(1, useful + 1)
    wanted = next((splits for splits in every if used(splits) >= _FULL), max(every, key=used))
    count = max(wanted, min(-(-max_seq_len // MAX_SPLIT_KEYS), MAX_SPLITS))
    return Splits(count, wanted, MAX_SPLIT_KEYS // KEYS), min_tiles


def launch_staying_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    output: torch.Tensor,
    counters: torch.Tensor,
    scale: float,
    v_scale: float,
    lse: torch.Tensor | None,
    num_splits: int | None,
) -> None:
    """Attend, where it serves; `paged_decode` checks the arguments, which are its own.

    Args:
        query: (B, Hq, D).
        cache: (num_blocks, 2, block_size, Hkv, D).
        block_tables: (B, max_blocks) int32.
        seq_lens: (B,) int32.
        max_seq_len: the longest sequence.
        output: (B, Hq, D), written.
        counters: int32, B * Hkv or more zeros.
        scale: multiplies the products of queries and stored keys.
        v_scale: what stored values are multiplied with.
        lse: (B, Hq) fp32, written.
        num_splits: of a sequence; None deals them out.
    """
    from attention.ops.triton.staying_decode_kernel import staying_decode_kernel

    batch, num_heads, head_size = query.shape
    _, _, block_size, num_kv_heads, _ = cache.shape
    num_sms = device_traits(query.device).num_sms
    splits, min_tiles = deal(batch * num_kv_heads, max_seq_len, num_sms)
    if num_splits is not None:
        splits = given_splits(num_splits)
    num_programs = min(_PROGRAMS * num_sms, batch * num_kv_heads * splits.count)
    lse_strides = (0, 0) if lse is None else lse.stride()
    with on_device(query):
        staying_decode_kernel[(num_programs,)](
            output, lse, *make_parts(batch, num_heads, splits.count, head_size, query.device), counters,
            query, cache[:, 0], cache[:, 1], block_tables, seq_lens, batch, scale, v_scale,
            splits.count, splits.wanted, splits.most_tiles,
            query.stride(0), query.stride(1), output.stride(0), output.stride(1), *lse_strides,
            block_tables.stride(0), cache.stride(0), cache.stride(2), cache.stride(3),
            NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, D=head_size, BLOCK_SIZE=block_size,
            BATCH_PADDED=max(_FEWEST_PADDED, triton.next_power_of_2(batch)), STAGES=_STAGES, MIN_TILES=min_tiles,
            num_warps=4, **dependent_launch(query.device, num_programs),
        )  # fmt: skip
