"""The tiles of the experts' second product with the sum over a token's experts in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SumTile:
    """One launch's shape; all but `num_stages` and `prefetched` powers of two.

    Attributes:
        outputs: of a program.
        inputs: of a step.
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
        prefetched: bytes of the first expert's weights that each thread brings to the L2 cache before it waits.
    """

    outputs: int
    inputs: int
    num_stages: int
    num_warps: int
    prefetched: int


USUAL = SumTile(outputs=16, inputs=512, num_stages=5, num_warps=8, prefetched=64)
