"""The kernel of one projection of all experts: a grouped matrix product, tile by tile.

The sorted pairs are cut into tiles of one expert each by a kernel (`token_groups.launch_tile_map`); how many there can
be at most is known without it. So the host launches that many programs for each block of outputs, never waits, and the
programs of tiles that do not exist end at once: a CUDA graph captures it for any routing. Rows are gathered as they are
loaded and spread as they are stored. Sums are float32 in an order that depends on the tile alone.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import device_traits, dot_dtype, on_device
from workers.ops.triton.grouped_tiles import GroupedTile, choose_tile
from workers.ops.triton.token_groups import launch_tile_map, most_tiles


@triton.jit
def _activated(
    gate: tl.tensor, up: tl.tensor, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
) -> tl.tensor:
    """`workers.layers.moe.activations.GatedActivation`."""
    if KIND == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        gate = gate / (1.0 + tl.exp(-ALPHA * gate))
    elif KIND == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    product: tl.tensor = gate * up
    return product


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_linear_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    pairs_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tile_experts_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    max_tiles: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
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
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
) -> None:
    """One program: `OUTPUTS` of the `M` columns of one tile's result.

    `BUNDLE` tiles share their blocks of outputs in time, so that the weights of an expert with several tiles are read
    from the L2 cache.
    """
    GATED: tl.constexpr = KIND is not None
    WEIGHT_ROWS: tl.constexpr = 2 * M if GATED else M
    COLUMNS: tl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    bundle = tl.program_id(0) // (BUNDLE * COLUMNS)
    in_bundle = tl.program_id(0) % (BUNDLE * COLUMNS)
    size = tl.minimum(max_tiles - bundle * BUNDLE, BUNDLE)
    tile = bundle * BUNDLE + in_bundle % size
    expert = tl.load(tile_experts_ptr + tile)
    if expert == NUM_EXPERTS:
        return
    row = tl.load(tile_rows_ptr + tile) + tl.arange(0, ROWS)
    there = row < tl.load(offsets_ptr + expert + 1)
    source = row
    destination = row
    if PAIRS_PER_ROW > 0:
        source = tl.load(pairs_ptr + row, mask=there, other=0) // PAIRS_PER_ROW
    if SPREAD:
        destination = tl.load(pairs_ptr + row, mask=there, other=0)
    feature = in_bundle // size * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = feature < M
    column = tl.arange(0, INPUTS)
    x_ptrs = x_ptr + source[:, None].to(tl.int64) * stride_x + column[None, :]
    first = expert.to(tl.int64) * (WEIGHT_ROWS * K)
    weight_ptrs = weight_ptr + first + feature[None, :].to(tl.int64) * K + column[:, None]
    result = tl.zeros([ROWS, OUTPUTS], tl.float32)
    up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for begin in tl.range(0, K, INPUTS, num_stages=STAGES):
        x_mask = there[:, None]
        weight_mask = inside[None, :]
        if K % INPUTS != 0:
            x_mask = x_mask & (begin + column < K)[None, :]
            weight_mask = weight_mask & (begin + column < K)[:, None]
        x = tl.load(x_ptrs + begin, mask=x_mask, other=0.0).to(DOT_DTYPE)
        weight = tl.load(weight_ptrs + begin, mask=weight_mask, other=0.0).to(DOT_DTYPE)
        result = tl.dot(x, weight, result, input_precision="ieee")
        if GATED:
            up_weight = tl.load(weight_ptrs + M * K + begin, mask=weight_mask, other=0.0).to(DOT_DTYPE)
            up = tl.dot(x, up_weight, up, input_precision="ieee")
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * WEIGHT_ROWS + feature
        result += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + M, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        result = _activated(result, up, KIND, ALPHA, LIMIT)
    out_ptrs = out_ptr + destination[:, None].to(tl.int64) * M + feature[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])


def launch_grouped_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    pairs: torch.Tensor,
    offsets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    pairs_per_row: int = 0,
    spread: bool = False,
    activation: tuple[str, float, float] | None = None,
    tile: GroupedTile | None = None,
) -> None:
    """Multiply into `out`; `workers.layers.moe.grouped_linear` checks the arguments.

    Args:
        out: (N, M), contiguous.
        x: rows of K contiguous elements.
        weight: (E, M, K), or (E, 2 * M, K) with an activation: gate above up; contiguous.
        pairs: (N,) int32 of the groups.
        offsets: (E + 1,) int32 of the groups.
        bias: as the weight, without K.
        pairs_per_row: pair n reads row n // pairs_per_row of x; 0: x is sorted as `pairs`.
        spread: write the result of pair n to row n; else sorted as `pairs`.
        activation: kind, alpha and limit of a gated one.
        tile: None: as the table says.
    """
    num_pairs, num_outputs = out.shape
    num_experts, _, num_inputs = weight.shape
    if num_pairs == 0 or num_outputs == 0:
        return
    if tile is None:
        traits = device_traits(x.device)
        tile = choose_tile(num_pairs, num_experts, x.dtype, activation is not None, traits.shared_memory)
    max_tiles = most_tiles(num_pairs, num_experts, tile.rows)
    tile_experts, tile_rows = launch_tile_map(offsets, num_pairs, tile.rows)
    kind, alpha, limit = activation or (None, 0.0, 0.0)
    with on_device(x):
        grouped_linear_kernel[(max_tiles * triton.cdiv(num_outputs, tile.outputs),)](
            out,
            x,
            weight,
            bias,
            pairs,
            offsets,
            tile_experts,
            tile_rows,
            max_tiles,
            x.stride(0),
            NUM_EXPERTS=num_experts,
            M=num_outputs,
            K=num_inputs,
            PAIRS_PER_ROW=pairs_per_row,
            SPREAD=spread,
            KIND=kind,
            ALPHA=alpha,
            LIMIT=limit,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            INPUTS=tile.inputs,
            BUNDLE=tile.bundle,
            STAGES=tile.num_stages,
            DOT_DTYPE=dot_dtype(x.dtype, weight.dtype),
            num_warps=tile.num_warps,
        )
