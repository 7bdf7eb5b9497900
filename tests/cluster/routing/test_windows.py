"""What the books hold of workers that give back what lies behind a window."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.routing.load_tracker import LoadTracker
from cluster.routing.types import NoPlacement, RoutingRequest
from cluster.routing.worker_table import WorkerTraits
from workers.runner.step_times import StepTimes

CAPABILITY = StepTimes(prefill=((100, 0.1),), decode=((1, 0.01), (8, 0.02)))
PREFILL = WorkerTraits("p", 10_000, 10, 1000, 8, CAPABILITY)
WHOLE = WorkerTraits("d", 10_000, 10, 40, 8, CAPABILITY)
WINDOW = dataclasses.replace(WHOLE, blocks_per_sequence=12)


def books(decode: WorkerTraits) -> LoadTracker:
    tracker = LoadTracker()
    tracker.update_pools({PREFILL: True}, {decode: True}, {})
    return tracker


def ask(tracker: LoadTracker, prompt_tokens: int, max_tokens: int = 8) -> bool:
    return not isinstance(tracker.place(RoutingRequest(prompt_tokens, max_tokens)), NoPlacement)


def test_a_sequence_counts_for_no_more_than_its_window():
    tracker = books(WINDOW)
    assert ask(tracker, 5000), "a prompt longer than the whole cache"
    for name in "abc":
        assert ask(tracker, 5000)
        tracker.reserve(name, "p", "d", 5000, 1000)
        tracker.grown(name, 5900)
    (worker,) = tracker.decode_workers.workers
    assert worker.free_blocks == 40 - 3 * 12
    assert not ask(tracker, 5000), "four blocks are left"
    assert not ask(tracker, 200)
    for name in "abc":
        tracker.release(name)
    assert worker.free_blocks == 40
    assert worker.peak_tokens == pytest.approx(0.0)


def test_a_short_sequence_counts_for_what_it_holds():
    tracker = books(WINDOW)
    tracker.reserve("a", "p", "d", 25, 4)
    (worker,) = tracker.decode_workers.workers
    assert worker.free_blocks == 37
    tracker.grown("a", 35)
    assert worker.free_blocks == 36


def test_expected_growth_ends_at_the_window():
    tracker = books(WINDOW)
    tracker.reserve("a", "p", "d", 5000, 1000)
    (worker,) = tracker.decode_workers.workers
    assert worker.peak_tokens <= 120 * 3, "the most, with head-room; it is one sequence of 120 tokens"
    assert worker.future[0].max() <= 120
    tracker.grown("a", 5500)
    assert worker.future[0].max() <= 120


def test_without_a_window_everything_counts():
    tracker = books(WHOLE)
    assert not ask(tracker, 400)
    tracker.reserve("a", "p", "d", 100, 1000)
    (worker,) = tracker.decode_workers.workers
    assert worker.free_blocks == 40 - 11
    assert worker.future[0].max() > 120
