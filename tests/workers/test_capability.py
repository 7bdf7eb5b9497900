"""What is measured, and how the router reads it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.capability import Capability, measure_decode, measure_prefill
from workers.decode_runner import DecodeRunner
from workers.model_runner import ModelRunner, Row
from workers.models.loader import load_model

POINTS = ((32, 0.010), (128, 0.020), (512, 0.100))


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(1, 0.010), (32, 0.010), (80, 0.015), (128, 0.020), (320, 0.060), (512, 0.100), (1024, 0.200)],
)
def test_interpolation(size, seconds):
    assert Capability(prefill=POINTS).prefill_seconds(size) == pytest.approx(seconds)
    assert Capability(decode=POINTS).decode_seconds(size) == pytest.approx(seconds)


def test_nothing_measured_costs_nothing():
    assert Capability().prefill_seconds(100) == 0.0
    assert Capability(prefill=POINTS).decode_seconds(4) == 0.0


@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(1e-6, 1e-1)), min_size=1, max_size=5),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
def test_more_work_is_never_predicted_to_take_less(steps, one, other):
    size, seconds, points = 0, 0.0, []
    for more_tokens, more_seconds in steps:  # measured times that rise with the size
        size, seconds = size + more_tokens, seconds + more_seconds
        points.append((size, seconds))
    capability = Capability(prefill=tuple(points))
    low, high = sorted((one, other))
    assert 0 < capability.prefill_seconds(low) <= capability.prefill_seconds(high) * (1 + 1e-9)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint("llama"), "float32", "cpu", 16)


def runner(model, num_blocks: int) -> ModelRunner:
    return ModelRunner(model, model.kv_cache_spec.allocate(num_blocks, "cpu"))


def test_prefill_is_measured_at_lengths_that_fit(model):
    capability = measure_prefill(runner(model, 40), max_tokens=600, budget_s=60)
    assert [tokens for tokens, _ in capability.prefill] == [32, 128, 512]
    assert all(seconds > 0 for _, seconds in capability.prefill)
    assert capability.decode == ()


@pytest.mark.parametrize(("num_blocks", "max_tokens", "longest"), [(1, 2048, 16), (8, 5, 5), (200, 100, 32)])
def test_a_small_worker_is_measured_at_what_it_can_hold(model, num_blocks, max_tokens, longest):
    capability = measure_prefill(runner(model, num_blocks), max_tokens=max_tokens, budget_s=60)
    assert [tokens for tokens, _ in capability.prefill] == [longest]


@pytest.mark.parametrize(
    ("num_blocks", "max_num_seqs", "batches"), [(1, 64, [1]), (8, 5, [1, 4]), (64, 16, [1, 4, 16])]
)
def test_decode_is_measured_at_batches_that_fit(model, num_blocks, max_num_seqs, batches):
    decoder = DecodeRunner(runner(model, num_blocks), max_num_seqs=max_num_seqs, max_model_len=600)
    capability = measure_decode(decoder, num_blocks=num_blocks, block_size=16, max_num_seqs=max_num_seqs, budget_s=60)
    assert [sequences for sequences, _ in capability.decode] == batches


def test_a_spent_budget_leaves_one_point(model):
    capability = measure_prefill(runner(model, 200), max_tokens=2048, budget_s=0)
    assert len(capability.prefill) == 1


def test_measuring_leaves_a_usable_runner(model):
    """What is left in the cache is overwritten by the first prompt."""
    measured, fresh = runner(model, 8), runner(model, 8)
    measure_prefill(measured, max_tokens=128, budget_s=60)
    row = [Row([5, 6, 7], 0, [3])]
    assert torch.equal(measured.forward(row), fresh.forward(row))
