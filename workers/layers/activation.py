"""Gated activations, on gate beside up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from workers.errors import ConfigError
from workers.ops.silu_and_mul import silu_and_mul

Kind = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]

_KINDS: dict[str, Kind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class GatedActivation:
    """`f(gate) * up`, or gpt-oss's variant of it.

    `clamped_swiglu` is `g * sigmoid(alpha * g) * (u + 1)`, with g = min(gate, limit) and u = up between -limit and
    limit (gpt-oss's published code).

    Attributes:
        kind: the function.
        alpha: of clamped_swiglu.
        limit: of clamped_swiglu.
    """

    kind: Kind = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    @classmethod
    def named(cls, name: str) -> GatedActivation:
        """The one that a config calls so (`hidden_act`).

        Raises:
            ConfigError: an unknown name.
        """
        if name not in _KINDS:
            raise ConfigError(f"activation {name!r} is none of {', '.join(_KINDS)}")
        return cls(_KINDS[name])

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(N, 2 * I), gate beside up, to (N, I) of the same dtype; computed in float32 and rounded once."""
        if self.kind == "silu":
            return silu_and_mul(gate_up)
        gate, up = gate_up.float().chunk(2, dim=-1)
        if self.kind == "clamped_swiglu":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
            gate = gate * torch.sigmoid(self.alpha * gate)
        else:
            gate = F.gelu(gate, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return (gate * up).to(gate_up.dtype)


SILU = GatedActivation()
"""SwiGLU's (Shazeer, 2020, arXiv:2002.05202)."""
