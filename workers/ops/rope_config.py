"""Rotary position embedding: its base and scaling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """The rope scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the rest blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base of its frequencies and how they are scaled."""

    theta: float
    scaling: Llama3Scaling | None = None
