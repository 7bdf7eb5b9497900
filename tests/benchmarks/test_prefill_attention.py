"""The benchmark of prefill's ways, with FlashAttention 4 stood in for: every way is right and has its figures."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fake_flash_attn
from attention.backends import flash_attn
from attention.backends.flash_attn import fa4
from attention.backends.flash_attn.versions import PROVIDERS
from attention.kv_cache import reshape_and_cache
from attention.spec import AttentionSpec, Phase
from benchmarks import prefill_attention
from benchmarks.attention import Case
from benchmarks.device_timing import Timing
from benchmarks.prefill_attention import Bench, gathering_pays_from

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, scale=0.25)
CASES = [Case(Phase.PREFILL, "whole", 2, 9, 9, 64), Case(Phase.PREFILL, "chunk", 1, 9, 70, 64)]


def timed_once(calls: Sequence[Callable[[], object]], device: torch.device, *, graph: bool = False) -> Timing:
    """As long as the first call takes."""
    began = time.perf_counter()
    calls[0]()
    return Timing(time.perf_counter() - began, 0.0, graph)


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = fake_flash_attn.flash_attn_4()
    provider = replace(PROVIDERS[1], kernel=functools.partial(fa4.flash_attn_4, False))
    monkeypatch.setattr(fa4, "load_library", lambda *_: library)
    monkeypatch.setattr(flash_attn, "choose_provider", lambda *_, **__: provider)
    monkeypatch.setattr(Bench, "refusal", lambda _, way, __: "" if way.version == 4 else "not here")
    monkeypatch.setattr(flash_attn.PagedAttention, "write_to_paged_cache", staticmethod(reshape_and_cache))
    monkeypatch.setattr(prefill_attention, "time_calls", timed_once)
    for rate in ("copy_bandwidth", "matrix_rate"):
        monkeypatch.setattr(prefill_attention, rate, lambda *_: 1.0)
    yield
    fa4.launcher_of.cache_clear()


def run(out: Path, *more: str) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser()
    prefill_attention.add_arguments(parser)
    arguments = parser.parse_args(["--device", "cpu", "--output", str(out), *more])
    content: dict[str, list[dict[str, float]]] = json.loads(prefill_attention.run(arguments, CASES, SPEC).read_text())
    return content


def test_every_way_gives_the_right_numbers_and_its_figures(stood_in: None, tmp_path: Path) -> None:
    rows = run(tmp_path / "found.json")["rows"]
    ways = [(row["name"], row["way"]) for row in rows]
    pages = [("chunk", f"FA4 pages {size}") for size in (16, 64, 128)]
    assert ways == [("whole", "FA4 own"), *pages, ("chunk", "FA4 gathered")]
    assert [row.get("error") for row in rows] == [None] * 5
    assert all(row["seconds"] > 0 and row["host_seconds"] > 0 for row in rows)
    assert rows[-1]["gather_seconds"] > 0


def test_nothing_is_begun_when_the_time_is_over(stood_in: None, tmp_path: Path) -> None:
    assert run(tmp_path / "found.json", "--budget", "0")["rows"] == []


def test_where_gathering_pays() -> None:
    chunk = {"name": "chunk", "query_len": 1000}
    rows = [
        {**chunk, "way": "FA4 pages 64", "seconds": 1.5},
        {**chunk, "way": "FA4 gathered", "seconds": 1.2, "gather_seconds": 0.2},
        {**chunk, "way": "FA4 pages 16", "error": "none"},
    ]
    # In one piece it takes 1.0: pages lose 0.5, gathering costs 0.2, so it pays from 0.4 of these 2000 heads on.
    assert gathering_pays_from(rows, SPEC) == {"chunk": pytest.approx(800)}
