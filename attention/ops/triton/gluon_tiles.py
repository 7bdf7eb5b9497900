"""What the kernels in Gluon share: the softmax's constants, and where the elements of a tile are."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attention.ops.triton import tiles

LN_2 = gl.constexpr(tiles.LN_2.value)
LOG2_E = gl.constexpr(tiles.LOG2_E.value)
LOWEST = gl.constexpr(-1.0e30)
"""What the largest score is taken for before there is one: no infinity, of which differences were no number."""


@gluon.jit
def places_of(
    FIRST: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr, LAYOUT: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Numbers along each of three axes of these sizes, of shapes that broadcast to a tile of a layout."""
    first = gl.arange(0, FIRST, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None][:, :, None]
    second = gl.arange(0, SECOND, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :][:, :, None]
    third = gl.arange(0, THIRD, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :][:, None, :]
    return first, second, third
