"""SwiGLU's first half of many rows in one kernel: quack's product for Hopper, whose epilogue is the activation.

cuBLAS writes gate and up, which another kernel reads again; from about a thousand rows on that costs 7 to 8 % of both
(benchmarks/results/gated_linear_h200.json). quack-kernels comes with flash-attn-4 and takes the weight as it is, gate
above up. Its kernel is compiled when it is first called, which takes about three seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from attention.broken import import_fault, report_broken
from attention.platform import PACKAGES, installed_packages

MIN_ROWS = 1024
"""Where it begins to pay: of 512 rows both ways take the same time."""

_GRANULE = 64
"""Features and inputs that a weight's are multiples of: what the tiles were measured with."""
_NUM_SMS = 132
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
        (T, I); None where two kernels are faster, or the library is not there or does not work.
    """
    if not fits(x, weight) or not usable(x.device):
        return None
    return _quack(x, weight)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether there are rows enough, and the kernel takes such operands."""
    return (
        x.shape[0] >= MIN_ROWS
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[0] % (2 * _GRANULE) == 0
        and weight.shape[1] % _GRANULE == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
    )


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether this is a GPU that the kernel was measured on, and quack is installed and works; tries it once."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor, properties.multi_processor_count) != (9, 0, _NUM_SMS):
        return False
    if "quack" not in installed_packages() or import_fault("quack", _MODULE, ("gemm_gated",)) is not None:
        return False
    fault = kernel_fault(_quack, device)
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
        message = next(iter(str(failure).splitlines()), "")
        return f"{type(failure).__name__}: {message:.200}"
    return None if error <= _TOLERANCE else f"wrong numbers: off by {error:.2g}, {_TOLERANCE:g} are allowed"


def _quack(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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
    """quack's function and its tiles: the fastest, or within 2 % of it, for 2,048 rows and more."""
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
