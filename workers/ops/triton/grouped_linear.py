"""One projection of all experts in a Triton kernel: a grouped matrix product, tile by tile.

The sorted pairs are cut into tiles of one expert each on the device (`token_groups`); how many there can be at most is
known without it. So the host launches that many programs for each block of outputs, never waits, and the programs of
tiles that do not exist end at once: a CUDA graph captures it for any routing. Sums are float32 in an order that depends
on the tile alone.
"""

from __future__ import annotations

import torch
import triton

from attention.ops.triton.dependent_launch import launches_dependents
from attention.ops.triton.launch import device_traits, dot_dtype, on_device
from workers.ops.grouped_tiles import GroupedTile, choose_tile
from workers.ops.triton.grouped_few_rows import grouped_few_rows_kernel
from workers.ops.triton.grouped_many_rows import grouped_many_rows_kernel
from workers.ops.triton.grouped_tma_rows import launch_grouped_tma_rows
from workers.ops.triton.prefetch_rows import prefetched_bytes

_SHARED_BYTES = 4096
"""What each thread brings to the L2 cache of experts that are known before the tokens' are chosen."""


def grouped_tile(num_pairs: int, weight: torch.Tensor, gated: bool) -> GroupedTile:
    """The table's tile for N pairs and (E, M, K) weights."""
    traits = device_traits(weight.device)
    num_experts, weight_rows, num_inputs = weight.shape
    shape = (num_experts, weight_rows, num_inputs, gated)
    return choose_tile(num_pairs, shape, weight.dtype, traits.arch, traits.shared_memory)


def launch_grouped_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: GroupedTile,
    tiles: torch.Tensor,
    pairs: torch.Tensor | None,
    *,
    offsets: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    pairs_per_row: int = 0,
    spread: bool = False,
    activation: tuple[str, float, float] | None = None,
    num_tokens: int = 0,
    num_shared: int = 0,
    routed_before: bool = False,
) -> None:
    """Multiply into `out`; `workers.layers.moe.grouped_linear` checks the arguments.

    Args:
        out: (N, M), contiguous.
        x: rows of K contiguous elements.
        weight: (E, M, K), or (E, 2 * M, K) with an activation: gate above up; contiguous.
        tile: the launch's shape.
        tiles: of `token_groups.launch_tile_map`, for the rows of the tile; without `pairs` (N,) integers: each one's
            expert.
        pairs: (N,) int32 of the groups. None: each pair is a tile, which `few_rows` alone takes; neither x nor `out` is
            sorted.
        offsets: (E + 1,) int32 of the groups, which `tma_rows` alone needs.
        bias: as the weight, without K.
        pairs_per_row: pair n reads row n // pairs_per_row of x; 0: x is sorted as `pairs`.
        spread: write the result of pair n to row n; else sorted as `pairs`.
        activation: kind, alpha and limit of a gated one.
        num_tokens: T.
        num_shared: the first experts, which all tokens go to.
        routed_before: whether the tiles were made before the kernel that made x was launched.

    Raises:
        ValueError: no groups for a kernel that needs them.
    """
    num_pairs, num_outputs = out.shape
    num_experts, _, num_inputs = weight.shape
    if num_pairs == 0 or num_outputs == 0:
        return
    gated = activation is not None
    num_tiles = tiles.shape[-1]
    kind, alpha, limit = activation or (None, 0.0, 0.0)
    common = {
        "NUM_EXPERTS": num_experts,
        "M": num_outputs,
        "K": num_inputs,
        "PAIRS_PER_ROW": pairs_per_row,
        "SPREAD": spread,
        "KIND": kind,
        "ALPHA": alpha,
        "LIMIT": limit,
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "INPUTS": tile.inputs,
        "BUNDLE": tile.bundle,
        "DOT_DTYPE": dot_dtype(x.dtype, weight.dtype),
        "num_warps": tile.num_warps,
    }
    grid = (num_tiles * triton.cdiv(num_outputs, tile.outputs),)
    with on_device(x):
        if tile.kernel == "tma_rows":
            if pairs is None or offsets is None:
                raise ValueError("tma_rows needs the groups' pairs and offsets")
            launch_grouped_tma_rows(out, x, weight, bias, pairs, tiles, offsets, tile, common)
            return
        common["STAGES"] = tile.num_stages
        if tile.kernel == "many_rows":
            grouped_many_rows_kernel[grid](out, x, weight, bias, pairs, tiles, num_tiles, x.stride(0), **common)
            return
        dependent = launches_dependents(x.device)
        threads, own_rows = 32 * tile.num_warps, tile.outputs * (2 if gated else 1)
        row_bytes = num_inputs * weight.element_size()
        shared = num_shared > 0 and num_tokens > 0 and not routed_before
        grouped_few_rows_kernel[grid](
            out,
            x,
            weight,
            bias,
            pairs,
            tiles,
            num_tiles,
            num_tokens,
            x.stride(0),
            ALONE=pairs is None,
            PREFETCHED=prefetched_bytes(tile.prefetched, row_bytes, own_rows, threads),
            NUM_SHARED=num_shared if shared else 0,
            SHARED_PREFETCHED=prefetched_bytes(_SHARED_BYTES, row_bytes, own_rows, threads) if shared else 0,
            THREADS=threads,
            ROUTED_BEFORE=routed_before,
            PDL=dependent,
            **common,
            **({"launch_pdl": True} if dependent else {}),
        )
