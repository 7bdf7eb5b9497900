"""SwiGLU's first half of many rows in one kernel: quack's product for Hopper, whose epilogue is the activation.

cuBLAS writes gate and up, which another kernel reads again. quack-kernels comes with flash-attn-4 and takes the weight
as it is, gate above up. Its kernel is compiled when it is first called, which takes about three seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812

from attention.broken import import_fault, in_a_line, report_broken
from attention.platform import PACKAGES, installed_packages
from workers.ops.measured_gpu import is_measured

ROWS: Mapping[tuple[int, int], tuple[int, int]] = MappingProxyType(
    {
        # (rows of the weight, its columns): the fewest and the most rows of x
        (16384, 2048): (1024, 1 << 30),
        (24576, 4096): (1536, 8192),
        (28672, 4096): (1536, 8192),
        (37888, 3584): (1536, 1 << 30),
    }
)
"""Where it is faster than two kernels on an H200, of the products of 1B to 8B models that were measured
(benchmarks/results/gated_linear_h200.json): by 14 to 17 %, 4 to 9 %, 2 to 7 % and 10 to 23 %. Of other products there,
with 8,192 columns, it is not."""

_MODULE = "quack.gemm_interface"
_TRIAL = (256, 512, 256)
_TOLERANCE = 2e-2

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """`silu(x @ gate.T) * (x @ up.T)`, rounded once.

    Args:
        x: (T, K) bfloat16, the elements of a row contiguous.
        weight: (2 * I, K) of x's dtype, contiguous: gate above up.

    Returns:
        (T, I); None where two kernels are faster, nothing was measured, or the library is not there or does not work.
    """
    if not fits(x, weight) or not usable(x.device):
        return None
    return quack_gated_linear(x, weight)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether such a product is faster so, and the kernel takes such operands."""
    fewest, most = ROWS.get((weight.shape[0], weight.shape[1]), (1, 0))
    return (
        fewest <= x.shape[0] <= most
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
    )


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether this is a GPU that the kernel was measured on, and quack is installed and works; tries it once."""
    if not is_measured(device):
        return False
    if "quack" not in installed_packages() or import_fault("quack", _MODULE, ("gemm_gated",)) is not None:
        return False
    fault = kernel_fault(quack_gated_linear, device)
    if fault is not None:
        report_broken(PACKAGES["quack"][1], fault)
    return fault is None


def kernel_fault(kernel: Kernel, device: torch.device) -> str | None:
    """What goes wrong with a small product, None when nothing does."""
    rows, features, inputs = _TRIAL
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(n, inputs, generator=generator, device=device).bfloat16() / inputs**0.25 for n in (rows, features)
    )
    gate, up = (x.float() @ weight.float().t()).chunk(2, dim=-1)
    expected = F.silu(gate) * up
    try:
        error = float((kernel(x, weight).float() - expected).norm() / expected.norm())
    except Exception as failure:  # libraries raise whatever they like
        return in_a_line(failure)
    return None if error <= _TOLERANCE else f"wrong numbers: off by {error:.2g}, {_TOLERANCE:g} are allowed"


def quack_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`gated_linear` by the library's kernel, whatever the table says; arguments as there."""
    gemm_gated, config = _function()
    out: torch.Tensor = gemm_gated(
        x,
        weight.t(),
        activation="swiglu",
        store_preact=False,
        concat_layout=("B",),
        config=config,
        tuned=False,
    )[1]
    return out


@functools.cache
def _function() -> tuple[Callable[..., tuple[object, torch.Tensor]], object]:
    """quack's function and its tiles: of 2,048 to 8,192 rows the fastest of twelve."""
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_gated

    config = GemmConfig(
        tile_m=128,
        tile_n=192,
        pingpong=True,
        cluster_m=2,
        cluster_n=1,
        swap_ab=False,
        device_capacity=9,
        is_dynamic_persistent=False,
    )
    return gemm_gated, config
