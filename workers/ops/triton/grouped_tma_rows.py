"""The kernel of a grouped product where experts have many rows, for Hopper: its tensor memory accelerator reads.

One or two programs of a multiprocessor take tile after tile. All steps of all its tiles are one loop, so that the next
tile is read while the last one is written: an expert's K is short, and beginnings and ends are a good part of a tile.
What the accelerator reads beyond an expert's matrix is zero; rows of another expert, which it reads as well, are not
stored. Gate and up lie one above the other in a single operand of the matrix instruction: with an instruction for each,
the compiler would have them wait for each other.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.dependent_launch import num_sms
from attention.ops.triton.launch import device_traits
from workers.ops.grouped_tiles import STORED_OUTPUTS, GroupedTile, staged_bytes
from workers.ops.tensor_map import has_tensor_map
from workers.ops.triton.gated_activation import gated_activation
from workers.ops.triton.pair_tiles import tile_and_output

_HALF_OF_WARPS = 4
"""Warps of a program that leave registers for a second one on a multiprocessor."""


@triton.jit
def _position(
    index: tl.tensor,
    tiles_ptr: tl.tensor,
    max_tiles: tl.tensor,
    num_tiles: tl.tensor,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BUNDLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of the n-th block of the result its expert, its first row, where the expert's rows end, and its first output."""
    tile, first = tile_and_output(index, num_tiles, COLUMNS, OUTPUTS, BUNDLE)
    expert = tl.load(tiles_ptr + tile)
    row = tl.load(tiles_ptr + max_tiles + tile)
    end = tl.load(tiles_ptr + 2 * max_tiles + tile)
    return expert, row, end, first


@triton.jit
def _halves(both: tl.tensor, ROWS: tl.constexpr, SIZE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The first `SIZE` columns and the last."""
    low, high = tl.reshape(both, (ROWS, 2, SIZE)).permute(0, 2, 1).split()
    return low, high


@triton.jit
def _store(
    out_ptr: tl.tensor,
    result: tl.tensor,
    destination: tl.tensor,
    there: tl.tensor,
    first: tl.tensor,
    M: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """`SIZE` columns from `first` on."""
    feature = first + tl.arange(0, SIZE)
    out_ptrs = out_ptr + destination[:, None].to(tl.int64) * M + feature[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there[:, None] & (feature < M)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_tma_rows_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    x_map: tl.tensor_descriptor | None,
    weight_map: tl.tensor_descriptor,
    bias_ptr: tl.tensor | None,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    max_tiles: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SPREAD: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BUNDLE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STORED: tl.constexpr,
) -> None:
    """One program: every `PROGRAMS`-th block of the result, `ROWS` of an expert's pairs by `OUTPUTS` of its outputs."""
    GATED: tl.constexpr = KIND is not None
    PARTS: tl.constexpr = 2 if GATED else 1
    COLUMNS: tl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    each = tl.arange(0, PADDED_EXPERTS)
    known = each < NUM_EXPERTS
    begins = tl.load(offsets_ptr + each, mask=known, other=0)
    ends = tl.load(offsets_ptr + each + 1, mask=known, other=0)
    num_tiles = tl.sum((ends - begins + ROWS - 1) // ROWS, axis=0)
    column = tl.arange(0, INPUTS)
    for index in tl.range(tl.program_id(0), num_tiles * COLUMNS, PROGRAMS, flatten=True):
        expert, begin, end, first = _position(index, tiles_ptr, max_tiles, num_tiles, COLUMNS, OUTPUTS, BUNDLE)
        row = begin + tl.arange(0, ROWS)
        there = row < end
        if x_map is None:
            source = row
            if PAIRS_PER_ROW > 0:
                source = tl.load(pairs_ptr + row, mask=there, other=0) // PAIRS_PER_ROW
            x_ptrs = x_ptr + source[:, None].to(tl.int64) * stride_x + column[None, :]
        result = tl.zeros([ROWS, PARTS * OUTPUTS], tl.float32)
        for step in tl.range(0, (K + INPUTS - 1) // INPUTS):
            if x_map is not None:
                x = x_map.load([begin, step * INPUTS])
            elif K % INPUTS == 0:
                x = tl.load(x_ptrs + step * INPUTS, mask=there[:, None], other=0.0)
            else:
                within = step * INPUTS + column < K
                x = tl.load(x_ptrs + step * INPUTS, mask=there[:, None] & within[None, :], other=0.0)
            weight = weight_map.load([expert * PARTS, first, step * INPUTS]).reshape(PARTS * OUTPUTS, INPUTS)
            result = tl.dot(x.to(DOT_DTYPE), weight.to(DOT_DTYPE).T, result)
        # Read again: what the loads need is then not kept for as long as loads are ahead.
        expert, begin, end, first = _position(index, tiles_ptr, max_tiles, num_tiles, COLUMNS, OUTPUTS, BUNDLE)
        row = begin + tl.arange(0, ROWS)
        there = row < end
        destination = row
        if SPREAD:
            destination = tl.load(pairs_ptr + row, mask=there, other=0)
        feature = first + tl.arange(0, OUTPUTS)
        if GATED:
            result, up = _halves(result, ROWS, OUTPUTS)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + expert * (PARTS * M) + feature
            result += tl.load(bias_ptrs, mask=feature < M, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_ptrs + M, mask=feature < M, other=0.0).to(tl.float32)[None, :]
        if GATED:
            result = gated_activation(result, up, KIND, ALPHA, LIMIT)
        if OUTPUTS > STORED:
            # A result on its way to memory takes its place beside the tiles that are being read: half of one less.
            low, high = _halves(result, ROWS, OUTPUTS // 2)
            _store(out_ptr, low, destination, there, first, M, OUTPUTS // 2)
            _store(out_ptr, high, destination, there, first + OUTPUTS // 2, M, OUTPUTS // 2)
        else:
            _store(out_ptr, result, destination, there, first, M, OUTPUTS)


def has_tma(weight: torch.Tensor, x: torch.Tensor | None) -> bool:
    """Whether the device has the accelerator, and it can read the weight.

    Args:
        weight: (E, M, K).
        x: (N, K) that the accelerator reads as well; None where its rows are gathered, or copied before.
    """
    readable = has_tensor_map(weight) and (x is None or has_tensor_map(x))
    return readable and device_traits(weight.device).arch == "sm90"


def launch_grouped_tma_rows(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: torch.Tensor,
    tiles: torch.Tensor,
    offsets: torch.Tensor,
    tile: GroupedTile,
    constants: dict[str, object],
) -> None:
    """Multiply into `out`; see `grouped_linear.launch_grouped_linear`, which has the constants of all kernels.

    Args:
        out: (N, M), contiguous.
        x: rows of K contiguous elements.
        weight: (E, M, K) or (E, 2 * M, K), contiguous.
        bias: as the weight, without K.
        pairs: (N,) int32.
        tiles: (3, `most_tiles`) int32.
        offsets: (E + 1,) int32.
        tile: the launch's shape.
        constants: of the kernel.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    num_experts, weight_rows, num_inputs = weight.shape
    parts = weight_rows // out.shape[1]
    matrices = weight.view(num_experts * parts, out.shape[1], num_inputs)
    weight_map = TensorDescriptor.from_tensor(matrices, [parts, tile.outputs, tile.inputs])
    x_map = TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]) if constants["PAIRS_PER_ROW"] == 0 else None
    used = staged_bytes(tile, parts == 2, x.dtype, tile.num_stages)
    two = tile.num_warps <= _HALF_OF_WARPS and 2 * used <= device_traits(x.device).shared_memory
    programs = num_sms(x.device) * (2 if two else 1)
    grouped_tma_rows_kernel[(programs,)](
        out,
        x,
        x_map,
        weight_map,
        bias,
        pairs,
        tiles,
        offsets,
        tiles.shape[1],
        x.stride(0),
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        STORED=STORED_OUTPUTS,
        PROGRAMS=programs,
        num_stages=tile.num_stages,
        **constants,
    )
