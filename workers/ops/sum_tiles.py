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


USUAL = SumTile(outputs=16, inputs=512, num_stages=5, num_warps=8, prefetched=0)

_FEW_PROGRAMS, _OUTPUTS = 192, 64


def sums_faster(num_outputs: int, top_k: int) -> bool:
    """Whether that is faster than a product and a sum of their own, for one token with k experts of M outputs.

    It is where the product would have too few programs to keep an H200's memory busy (benchmarks/results/
    moe_h200.json): gpt-oss-20b's 180 take 72 us with the first product, and 59 us so; of DeepSeek-V2-Lite with 256 it
    is 46 us against 50, of Qwen3-30B-A3B with as many the same.
    """
    return top_k * -(-num_outputs // _OUTPUTS) <= _FEW_PROGRAMS
