"""Where a backend runs other or fewer cases than the rest, because each costs it too much: which ones, and why.

What is left out here is counted in the suite's summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attention.spec import Feature
from attention_cases import Case
from attention_matrix import cases


@dataclass(frozen=True)
class Limit:
    """A backend's share of the cases.

    Attributes:
        why: what makes a case dear.
        axes: whose cases, see `attention_matrix.AXES`.
        keeps: which of them.
    """

    why: str
    axes: str
    keeps: Callable[[Case], bool]


def _tree_or_plain(case: Case) -> bool:
    """Trees, and each kind of batch without features."""
    return case.mask == "tree" or not (case.needs.all_features - {Feature.GQA, Feature.PREFIX})


def _flashinfer_modules(case: Case) -> bool:
    """Features in bf16 with heads of 128, the rest plain; XQA is compiled for each block size and head group, too."""
    if case.dtype is torch.float32 or case.head_size not in (64, 128, 256):
        return True  # refused, which costs nothing
    scores = {name for name in ("window", "soft_cap", "alibi", "fp8") if getattr(case, name)}
    main = case.dtype is torch.bfloat16 and case.head_size == 128
    group = case.num_heads // case.num_kv_heads
    if not main:
        return not scores and (case.block_size, group) == (16, 4)
    return len(scores) <= 2 and (case.block_size == 16 or (group == 4 and scores <= {"window"}))


def _flex_variants(case: Case) -> bool:
    """Features in bf16 with heads of 128, the rest plain."""
    plain = not (case.needs.all_features - {Feature.GQA, Feature.PREFIX, Feature.NON_CAUSAL})
    return plain or (case.dtype is torch.bfloat16 and case.head_size == 128)


_INTERPRETED = "Triton's interpreter runs a kernel hundreds of times slower: small shapes"
LIMITS: Mapping[tuple[str, str], Limit] = {
    ("TRITON_ATTN", "cpu"): Limit(_INTERPRETED, "interpreted", lambda case: True),
    ("FLASHINFER", "cuda"): Limit(
        "a module is compiled, 5 to 70 seconds each, for every dtype, head size and way to score",
        "cuda",
        _flashinfer_modules,
    ),
    ("FLEX_ATTENTION", "cuda"): Limit(
        "a kernel is compiled, 5 to 10 seconds each, for every dtype, head size and feature", "cuda", _flex_variants
    ),
    ("TREE_ATTN", "cpu"): Limit(_INTERPRETED, "interpreted", _tree_or_plain),
}
"""(backend, "cpu" or "cuda") to its limit."""


def cases_for(backend: str, device_type: str) -> tuple[Case, ...]:
    """The cases that a backend runs, or refuses, on a kind of device."""
    limit = LIMITS.get((backend, device_type))
    if limit is None:
        return cases(device_type)
    return tuple(case for case in cases(limit.axes) if limit.keeps(case))


def left_out(backend: str, device_type: str) -> int:
    """How many cases fewer a backend has because of its limit."""
    return len(cases(device_type)) - len(cases_for(backend, device_type))
