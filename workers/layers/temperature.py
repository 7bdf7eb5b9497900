"""Queries that grow with their position, so that attention over long contexts stays sharp."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionTemperature:
    """A query at position p is multiplied by `1 + scale * log(1 + floor((p + 1) / floor))`.

    After Nakanishi, 2025 (arXiv:2501.19399), as Llama-4's layers without positions do.

    Attributes:
        scale: strength (`attn_scale`).
        floor: tokens over which the factor stays (`floor_scale`).
    """

    scale: float
    floor: float

    def scaled(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(T, Hq, D) at (T,) int64 positions, computed in float32 and rounded once."""
        factors = torch.log1p(torch.floor((positions.float() + 1.0) / self.floor)) * self.scale + 1.0
        return (query * factors[:, None, None]).to(query.dtype)
