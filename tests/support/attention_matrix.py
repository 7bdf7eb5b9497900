"""All cases of the conformance suite: each axis varied around a base, pairs of features, and a random sample."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from attention.backend import KVScales
from attention.spec import AttentionType
from attention_batches import GPU_LONG, MIXED, TINY, Batches
from attention_cases import Batch, Case


@dataclass(frozen=True)
class Axes:
    """What is varied on a kind of device.

    Attributes:
        base: the case around which everything is varied.
        batches: lengths.
        dtypes: of everything.
        head_sizes: D.
        heads: (Hq, Hkv).
        block_sizes: tokens in a block.
        sample: how many random combinations.
    """

    base: Case
    batches: Batches
    dtypes: tuple[torch.dtype, ...]
    head_sizes: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    block_sizes: tuple[int, ...]
    sample: int


_FP8 = KVScales(0.013, 0.021)
VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"window": 9},
    "alibi": {"alibi": True},
    "cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "fp8": {"fp8": _FP8},
}
"""Features that go with each other; every pair is tried."""
MORE: tuple[dict[str, Any], ...] = (
    {"window": 1},
    {"window": 16},
    {"window": 64},
    {"window": 10_000},
    {"scale_factor": 0.4},
    {"fp8": KVScales(0.005, 0.004)},  # too small: what is beyond 448 times that is clamped
    {"fp8": KVScales()},
    {"new_keys": "none"},
    {"window": 40, "soft_cap": 3.0, "sinks": True},
    {"window": 40, "soft_cap": 3.0, "fp8": _FP8, "alibi": True},
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_SIZES = (32, 40, 64, 72, 80, 96, 128, 192, 256)
AXES = {
    "cpu": Axes(
        base=Case(MIXED, torch.float32, num_heads=4, num_kv_heads=2, head_size=32),
        batches=Batches(),
        dtypes=_FLOATS,
        head_sizes=_HEAD_SIZES,
        heads=((4, 4), (4, 1), (8, 1), (6, 2), (8, 2)),
        block_sizes=(1, 16, 32, 64, 128),
        sample=25,
    ),
    "cuda": Axes(
        base=Case(MIXED, torch.bfloat16, num_heads=8, num_kv_heads=2, head_size=128),
        batches=Batches(long=GPU_LONG),
        dtypes=_FLOATS,
        head_sizes=_HEAD_SIZES,
        heads=((8, 8), (8, 1), (32, 8), (6, 2), (16, 2), (5, 5)),
        block_sizes=(16, 32, 64, 128),
        sample=200,
    ),
    "interpreted": Axes(
        base=Case(MIXED, torch.float32, num_heads=2, num_kv_heads=1, head_size=32),
        batches=TINY,
        dtypes=(torch.float32, torch.bfloat16),
        head_sizes=(40, 128),
        heads=((1, 1), (6, 2)),
        block_sizes=(1, 16, 64),
        sample=0,
    ),
}
"""By device type; "interpreted" for kernels that an interpreter runs on the CPU, hundreds of times slower."""


@functools.cache
def cases(axes_name: str) -> tuple[Case, ...]:
    """All cases of these axes, without repetitions, in a fixed order."""
    axes = AXES[axes_name]
    found = {case.id: case for disconnect in _PARTS for case in disconnect(axes) if not case.spec.faults()}
    return tuple(found.values())


def _shapes(axes: Axes) -> Iterator[Case]:
    batches = axes.batches
    for batch in (*batches.core, *batches.more):
        for dtype in axes.dtypes:
            yield replace(axes.base, batch=batch, dtype=dtype)
    for batch in batches.core:
        for head_size in axes.head_sizes:
            yield replace(axes.base, batch=batch, head_size=head_size)
        for num_heads, num_kv_heads in axes.heads:
            yield replace(axes.base, batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads)
        for block_size in axes.block_sizes:
            yield replace(axes.base, batch=batch, block_size=block_size)
    for head_size in axes.head_sizes:
        for dtype in axes.dtypes:
            yield replace(axes.base, batch=batches.paired[-1], head_size=head_size, dtype=dtype)


def _features(axes: Axes) -> Iterator[Case]:
    batches, singles = axes.batches, list(VARIANTS.values())
    pairs = [a | b for i, a in enumerate(singles) for b in singles[i + 1 :]]
    for batch in batches.core:
        for variant in singles:
            yield replace(axes.base, batch=batch, **variant)
    for batch in batches.paired:
        for variant in (*MORE, *pairs):
            yield replace(axes.base, batch=batch, **variant)
        for dtype in axes.dtypes:
            for variant in singles:
                yield replace(axes.base, batch=batch, dtype=dtype, **variant)


def _long(axes: Axes) -> Iterator[Case]:
    variants: tuple[dict[str, Any], ...] = ({}, {"window": 60}, {"soft_cap": 3.0}, {"sinks": True}, {"fp8": _FP8})
    for batch in axes.batches.long:
        for variant in variants:
            yield replace(axes.base, batch=batch, **variant)
        yield replace(axes.base, batch=batch, block_size=64, window=1000)
        yield replace(axes.base, batch=batch, num_heads=8, num_kv_heads=1, head_size=64)


def _masks(axes: Axes) -> Iterator[Case]:
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"soft_cap": 3.0},
        {"sinks": True},
        {"fp8": _FP8},
        {"num_heads": 4, "num_kv_heads": 4},
        {"block_size": 64},
        *({"dtype": dtype} for dtype in axes.dtypes),
    )
    for variant in variants:
        for batch in axes.batches.trees:
            yield replace(axes.base, batch=batch, mask="tree", **variant)
        for batch in axes.batches.custom:
            yield replace(axes.base, batch=batch, mask="custom", **variant)


def _cascades(axes: Axes) -> Iterator[Case]:
    base = replace(axes.base, common_prefix=axes.batches.common_prefix)
    variants: list[dict[str, Any]] = [
        {},
        {"num_heads": 4, "num_kv_heads": 4},
        {"common_prefix": 16},
        {"soft_cap": 3.0},
        {"sinks": True},
        {"fp8": _FP8},
        {"window": 280},
        *({"dtype": dtype} for dtype in axes.dtypes),
    ]
    if base.common_prefix % 64 == 0:
        variants.append({"block_size": 64})
    for batch in axes.batches.shared:
        yield replace(base, batch=batch)
        yield replace(base, batch=batch, window=50)
        for variant in variants:
            yield replace(base, batch=batch, cascade=True, **variant)


def _encoders(axes: Axes) -> Iterator[Case]:
    base = replace(axes.base, batch=axes.batches.encoder, attn_type=AttentionType.ENCODER_ONLY)
    yield replace(base, attn_type=AttentionType.ENCODER)
    yield replace(base, attn_type=AttentionType.ENCODER, alibi=True, window=20)
    for dtype in axes.dtypes:
        yield replace(base, dtype=dtype)
        yield replace(base, dtype=dtype, window=20)
    for head_size in axes.head_sizes:
        yield replace(base, head_size=head_size)
    for name, variant in VARIANTS.items():
        if name != "fp8":
            yield replace(base, **variant)
    yield replace(base, num_heads=4, num_kv_heads=4)
    yield replace(base, window=9, soft_cap=3.0, sinks=True)


def _crosses(axes: Axes) -> Iterator[Case]:
    base = replace(axes.base, batch=axes.batches.cross, attn_type=AttentionType.ENCODER_DECODER)
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"soft_cap": 3.0},
        {"sinks": True},
        {"fp8": _FP8},
        {"num_heads": 4, "num_kv_heads": 4},
        {"block_size": 64},
        {"head_size": 80},
        *({"dtype": dtype} for dtype in axes.dtypes),
    )
    for variant in variants:
        yield replace(base, **variant)
        yield replace(base, new_keys="some", **variant)
        yield replace(base, batch=axes.batches.cross_decode, new_keys="none", **variant)


def _sample(axes: Axes) -> Iterable[Case]:
    """Random combinations of everything that may be combined; the same ones every time."""
    rng = random.Random(20240617)
    singles = list(VARIANTS.values())
    for _ in range(axes.sample):
        num_heads, num_kv_heads = rng.choice(axes.heads)
        drawn: dict[str, Any] = {
            "batch": rng.choice((*axes.batches.core, _random_batch(rng))),
            "dtype": rng.choice(axes.dtypes),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_size": rng.choice(axes.head_sizes),
            "block_size": rng.choice(axes.block_sizes),
        }
        for variant in rng.sample(singles, k=rng.choice((0, 0, 1, 1, 2, 3))):
            drawn |= variant
        if drawn.get("window"):
            drawn["window"] = rng.choice((1, 2, 15, 16, 17, 64, 100, 500))
        yield replace(axes.base, **drawn)


def _random_batch(rng: random.Random) -> Batch:
    lens = []
    for _ in range(rng.randint(1, 9)):
        keys = max(1, rng.choice((16, 32, 64, 128, rng.randint(1, 300))) + rng.choice((-1, 0, 0, 1)))
        lens.append((rng.choice((1, keys, rng.randint(1, keys))), keys))
    return Batch("random" + "_".join(f"{q}of{k}" for q, k in lens), tuple(lens), None)


_PARTS = (_shapes, _features, _long, _masks, _cascades, _encoders, _crosses, _sample)
