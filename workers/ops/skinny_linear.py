"""Matrix products of a few rows, as decode has them: bound by how fast the weights can be read.

What comes behind a product is computed before its result is rounded: the bias, a residual addition, or the gated
activation of SwiGLU (Shazeer, 2020, arXiv:2002.05202). Sums over the inputs are float32, in an order that depends on
the tile alone: a row's result is the same bit for bit for every number of rows that has the same tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from workers.ops.skinny_tiles import SkinnyTile, fits
from workers.ops.weighted_sum import WeightedRows


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: SkinnyTile,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias + residual`, rounded once.

    Args:
        x: (T, K), at most as many rows as the tile has room for; the elements of a row contiguous.
        weight: (N, K) of x's dtype, contiguous.
        tile: of `skinny_tile`, without splits; its `features` divide N and its `inputs` K.
        bias: (N,) of x's dtype, contiguous.
        residual: (T, N) of x's dtype; the elements of a row contiguous.
        out: where to write, as `residual`, which it may be. None: a new tensor.

    Returns:
        (T, N).

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(x, weight, tile, weight.shape[0], bias, residual, out)
    _check_whole(tile)
    if not x.is_cuda:
        return skinny_linear_torch(x, weight, bias=bias, residual=residual, out=out)
    from workers.ops.triton.skinny_linear import launch_skinny_linear

    result = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    launch_skinny_linear(result, x, weight, tile, bias=bias, residual=residual)
    return result


def skinny_split_linear(
    x: torch.Tensor, weight: torch.Tensor, tile: SkinnyTile, bias: torch.Tensor | None = None
) -> WeightedRows:
    """`x @ weight.T + bias` as a sum of the tile's splits, each of a part of the inputs, in float32.

    Args:
        x: (T, K), as for `skinny_linear`.
        weight: (N, K) of x's dtype, contiguous.
        tile: of `split_tile`.
        bias: (N,) of x's dtype, contiguous; part of the first summand.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(x, weight, tile, weight.shape[0], bias, None, None)
    if not x.is_cuda:
        return skinny_split_linear_torch(x, weight, tile, bias)
    from workers.ops.triton.skinny_linear import launch_skinny_linear

    rows = torch.empty(x.shape[0] * tile.splits, weight.shape[0], dtype=torch.float32, device=x.device)
    launch_skinny_linear(rows, x, weight, tile, bias=bias)
    return WeightedRows(rows, tile.splits)


def skinny_gated_linear(
    x: torch.Tensor, weight: torch.Tensor, tile: SkinnyTile, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, rounded once.

    Args:
        x: (T, K), as for `skinny_linear`.
        weight: (2 * I, K) of x's dtype, contiguous: gate above up.
        tile: of `skinny_tile`; its `features` divide I and its `inputs` K.
        out: (T, I), as for `skinny_linear`.

    Returns:
        (T, I).

    Raises:
        ValueError: arguments that do not fit each other.
    """
    if weight.dim() == 2 and weight.shape[0] % 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: needs as many rows of gate as of up")
    _check(x, weight, tile, weight.shape[0] // 2, None, None, out)
    _check_whole(tile)
    if not x.is_cuda:
        return skinny_gated_linear_torch(x, weight, out)
    from workers.ops.triton.skinny_linear import launch_skinny_linear

    result = x.new_empty(x.shape[0], weight.shape[0] // 2) if out is None else out
    launch_skinny_linear(result, x, weight, tile, gated=True)
    return result


def skinny_linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`skinny_linear` in plain torch."""
    result = x.float() @ weight.float().t()
    for term in (bias, residual):
        if term is not None:
            result = result + term.float()
    return result.to(x.dtype) if out is None else out.copy_(result)


def skinny_split_linear_torch(
    x: torch.Tensor, weight: torch.Tensor, tile: SkinnyTile, bias: torch.Tensor | None = None
) -> WeightedRows:
    """`skinny_split_linear` in plain torch."""
    shares = zip(x.float().chunk(tile.splits, dim=1), weight.float().chunk(tile.splits, dim=1), strict=True)
    parts = [of_x @ of_weight.t() for of_x, of_weight in shares]
    if bias is not None:
        parts[0] += bias
    return WeightedRows(torch.stack(parts, dim=1).flatten(0, 1), tile.splits)


def skinny_gated_linear_torch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`skinny_gated_linear` in plain torch."""
    gate, up = (x.float() @ weight.float().t()).chunk(2, dim=-1)
    result = F.silu(gate) * up
    return result.to(x.dtype) if out is None else out.copy_(result)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: SkinnyTile,
    num_features: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[0] > tile.rows or x.stride(1) != 1:
        raise ValueError(
            f"x of shape {tuple(x.shape)} with strides {x.stride()}: needs at most {tile.rows} contiguous rows"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight of {weight.dtype} {tuple(weight.shape)} with strides {weight.stride()} for x of {x.dtype} "
            f"{tuple(x.shape)}: needs contiguous rows of x's length and dtype"
        )
    if not fits(tile, num_features, weight.shape[1]):
        raise ValueError(f"{tile} does not divide {num_features} features of {weight.shape[1]} inputs")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias of {bias.dtype} {tuple(bias.shape)} for {weight.shape[0]} features of {x.dtype}")
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (
            tensor.shape != (x.shape[0], num_features) or tensor.dtype != x.dtype or tensor.stride(1) != 1
        ):
            raise ValueError(
                f"{name} of {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}: "
                f"needs contiguous rows of {x.dtype} {(x.shape[0], num_features)}"
            )


def _check_whole(tile: SkinnyTile) -> None:
    if tile.splits != 1:
        raise ValueError(f"{tile} leaves {tile.splits} summands")
