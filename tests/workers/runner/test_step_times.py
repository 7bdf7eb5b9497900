"""What is measured, and how the router reads it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_groups import group_caches
from workers.models.loader import load_model
from workers.runner.decode_runner import DecodeRunner
from workers.runner.measured_steps import measure_decode, measure_prefill
from workers.runner.model_runner import ModelRunner, Row
from workers.runner.step_times import StepTimes

POINTS = ((32, 0.010), (128, 0.020), (512, 0.100))


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(1, 0.010), (32, 0.010), (80, 0.015), (128, 0.020), (320, 0.060), (512, 0.100), (1024, 0.200)],
)
def test_interpolation(size, seconds):
    assert StepTimes(prefill=POINTS).prefill_seconds(size) == pytest.approx(seconds)
    assert StepTimes(decode=POINTS).decode_seconds(size) == pytest.approx(seconds)


def test_nothing_measured_costs_nothing():
    assert StepTimes().prefill_seconds(100) == 0.0
    assert StepTimes(prefill=POINTS).decode_seconds(4) == 0.0


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
    step_times = StepTimes(prefill=tuple(points))
    low, high = sorted((one, other))
    assert 0 < step_times.prefill_seconds(low) <= step_times.prefill_seconds(high) * (1 + 1e-9)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint("llama"), "float32", "cpu", 16)


def runner(model, num_blocks: int) -> ModelRunner:
    return ModelRunner(model, group_caches(model, num_blocks))


def test_prefill_is_measured_at_lengths_that_fit(model):
    step_times = measure_prefill(runner(model, 40), max_tokens=600, budget_s=60)
    assert [tokens for tokens, _ in step_times.prefill] == [32, 128, 512]
    assert all(seconds > 0 for _, seconds in step_times.prefill)
    assert step_times.decode == ()


@pytest.mark.parametrize(("num_blocks", "max_tokens", "longest"), [(1, 2048, 16), (8, 5, 5), (200, 100, 32)])
def test_a_small_worker_is_measured_at_what_it_can_hold(model, num_blocks, max_tokens, longest):
    step_times = measure_prefill(runner(model, num_blocks), max_tokens=max_tokens, budget_s=60)
    assert [tokens for tokens, _ in step_times.prefill] == [longest]


@pytest.mark.parametrize(
    ("num_blocks", "max_num_seqs", "batches"), [(1, 64, [1]), (8, 5, [1, 4]), (64, 16, [1, 4, 16])]
)
def test_decode_is_measured_at_batches_that_fit(model, num_blocks, max_num_seqs, batches):
    decoder = DecodeRunner(runner(model, num_blocks), max_num_seqs=max_num_seqs, max_model_len=600)
    step_times = measure_decode(
        decoder,
        groups=decoder.groups,
        num_blocks=[num_blocks],
        max_num_seqs=max_num_seqs,
        max_model_len=600,
        budget_s=60,
    )
    assert [sequences for sequences, _ in step_times.decode] == batches


def test_a_spent_budget_leaves_one_point(model):
    step_times = measure_prefill(runner(model, 200), max_tokens=2048, budget_s=0)
    assert len(step_times.prefill) == 1


def test_measuring_leaves_a_usable_runner(model):
    """What is left in the cache is overwritten by the first prompt."""
    measured, fresh = runner(model, 8), runner(model, 8)
    measure_prefill(measured, max_tokens=128, budget_s=60)
    row = [Row([5, 6, 7], 0, [[3]])]
    assert torch.equal(measured.forward(row), fresh.forward(row))


class Watched:
    """A decoder that notes how far every sequence of every launch reaches."""

    def __init__(self, decoder: DecodeRunner) -> None:
        self.decoder = decoder
        self.reached: list[int] = []

    def launch(self, sequences):
        for sequence in sequences:
            assert sequence.tables.num_slots >= sequence.num_scheduled
            self.reached.append(sequence.num_scheduled)
        return self.decoder.launch(sequences)


BLOCK_SIZE = 1


@pytest.mark.parametrize("max_model_len", [2, 3, 5, 6, 40])
def test_decode_is_measured_within_the_context_window(max_model_len, tiny_checkpoint):
    small = load_model(tiny_checkpoint("llama"), "float32", "cpu", BLOCK_SIZE)
    watched = Watched(DecodeRunner(runner(small, 64), max_num_seqs=4, max_model_len=max_model_len))
    step_times = measure_decode(
        watched,
        groups=watched.decoder.groups,
        num_blocks=[64],
        max_num_seqs=4,
        max_model_len=max_model_len,
        budget_s=60,
    )
    assert [sequences for sequences, _ in step_times.decode] == [1, 4]
    assert all(seconds > 0 for _, seconds in step_times.decode)
    assert max(watched.reached) == min(5, max_model_len)


class Reckoned:
    """A decoder of which a step is said to take 10 ms, and 2 µs for each token that its batch has before it."""

    def __init__(self, decoder: DecodeRunner) -> None:
        self.decoder = decoder
        self.seconds, self.longest = 0.0, 0

    def launch(self, sequences):
        blocks = [block for sequence in sequences for block in sequence.tables.groups[0].blocks]
        tokens = sum(sequence.num_scheduled for sequence in sequences)
        self.longest = max(self.longest, tokens)
        assert tokens < 100 or len(set(blocks)) == len(blocks), "what is read has to come from memory"
        self.seconds = 0.01 + 2e-6 * tokens
        return self.decoder.launch(sequences)


@pytest.mark.parametrize(
    ("num_blocks", "max_model_len", "longest"), [(300, 2000, 4800), (300, 300, 1200), (100, 2000, 1600)]
)
def test_what_a_token_in_the_cache_costs_is_measured(model, num_blocks, max_model_len, longest):
    decoder = DecodeRunner(runner(model, num_blocks), max_num_seqs=4, max_model_len=max_model_len)
    reckoned = Reckoned(decoder)
    step_times = measure_decode(
        reckoned,
        groups=decoder.groups,
        num_blocks=[num_blocks],
        max_num_seqs=4,
        max_model_len=max_model_len,
        budget_s=10.0,
        agree=lambda _: reckoned.seconds,
    )
    assert step_times.kv_token_s == pytest.approx(2e-6, rel=0.01)
    assert 0.98 * longest <= reckoned.longest <= longest
    assert step_times.decode_seconds(4, 1000) == pytest.approx(step_times.decode_seconds(4) + 0.002, rel=0.01)


def test_a_cache_that_is_too_small_to_tell_says_nothing_of_tokens(model):
    decoder = DecodeRunner(runner(model, 8), max_num_seqs=4, max_model_len=600)
    step_times = measure_decode(decoder, groups=decoder.groups, num_blocks=[8], max_num_seqs=4, max_model_len=600)
    assert step_times.kv_token_s == 0.0
    assert [sequences for sequences, _ in step_times.decode] == [1, 4]


def test_where_no_token_can_follow_a_prompt_no_decode_is_measured(model):
    decoder = DecodeRunner(runner(model, 4), max_num_seqs=4, max_model_len=1)
    assert (
        measure_decode(decoder, groups=decoder.groups, num_blocks=[4], max_num_seqs=4, max_model_len=1) == StepTimes()
    )


@pytest.mark.parametrize(("agreed_s", "runs"), [(1e-6, 8), (0.02, 3), (1.0, 2)])
def test_ranks_repeat_as_often_as_they_agree(model, agreed_s, runs):
    """What a rank measured itself says nothing: the others may have measured something else."""
    measured: list[float] = []

    def agree(seconds: float) -> float:
        measured.append(seconds)
        return agreed_s

    step_times = measure_prefill(runner(model, 4), max_tokens=32, budget_s=60, agree=agree)
    assert len(measured) == runs
    assert step_times.prefill == ((32, agreed_s),)
