"""The gated activation of SwiGLU (Shazeer, 2020, arXiv:2002.05202) on the output of one fused projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up`, computed in float32 and rounded once.

    Args:
        gate_up: (T, 2 * I), gate beside up; the elements of a row contiguous.
        out: (T, I) of the same dtype, the elements of a row contiguous. None: a new tensor.

    Returns:
        (T, I).

    Raises:
        ValueError: arguments that do not fit each other.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up of shape {tuple(gate_up.shape)} with strides {gate_up.stride()}: "
            "needs (tokens, 2 * intermediate size) with contiguous rows"
        )
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if out is not None and (out.shape != shape or out.dtype != gate_up.dtype or out.stride(1) != 1):
        raise ValueError(f"out of {out.dtype} {tuple(out.shape)} for {gate_up.dtype} {shape} with contiguous rows")
    if not gate_up.is_cuda:
        return silu_and_mul_torch(gate_up, out)
    from workers.ops.triton.silu_and_mul import launch_silu_and_mul

    result = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    launch_silu_and_mul(gate_up, result)
    return result


def silu_and_mul_torch(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_and_mul` in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    result = F.silu(gate).mul_(up).to(gate_up.dtype)
    return result if out is None else out.copy_(result)
