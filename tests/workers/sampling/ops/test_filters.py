"""The filters against transformers' logits warpers, and where those leave something open."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from workers.sampling.ops.filters import filter_min_p, filter_top_k, filter_top_p

NEG_INF = float("-inf")


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 4.0 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab_size", [2, 17, 1000])
def test_top_k_equals_transformers_with_another_k_per_row(vocab_size: int) -> None:
    ks = [1, 2, 5, 50, vocab_size]
    logits = random_logits(len(ks), vocab_size)
    kept = filter_top_k(logits, torch.tensor(ks))
    for row, k in enumerate(ks):
        torch.testing.assert_close(kept[row], TopKLogitsWarper(k)(None, logits[row : row + 1])[0])


@pytest.mark.parametrize("vocab_size", [2, 17, 1000, 5000])
def test_top_p_equals_transformers_with_another_p_per_row(vocab_size: int) -> None:
    ps = [1e-6, 0.1, 0.5, 0.9, 0.99]
    logits = random_logits(len(ps), vocab_size, seed=1)
    kept = filter_top_p(logits, torch.tensor(ps))
    for row, p in enumerate(ps):
        torch.testing.assert_close(kept[row], TopPLogitsWarper(p)(None, logits[row : row + 1])[0])


@pytest.mark.parametrize("vocab_size", [2, 17, 1000])
def test_min_p_equals_transformers_with_another_p_per_row(vocab_size: int) -> None:
    ps = [0.0, 0.01, 0.3, 0.9, 1.0]
    logits = random_logits(len(ps), vocab_size, seed=2)
    kept = filter_min_p(logits, torch.tensor(ps))
    for row, p in enumerate(ps):
        torch.testing.assert_close(kept[row], MinPLogitsWarper(p)(None, logits[row : row + 1])[0])


def test_top_p_keeps_the_smallest_sufficient_set_and_lower_ids_of_equals() -> None:
    for vocab_size in (8, 4096):
        kept = filter_top_p(torch.zeros(1, vocab_size), torch.tensor([0.5]))
        half = vocab_size // 2
        assert kept[0].isfinite().tolist() == [True] * half + [False] * half


def test_top_p_keeps_one_token_however_small_it_is() -> None:
    kept = filter_top_p(torch.tensor([[1.0, 2.0]]), torch.tensor([1e-60]))
    assert kept.tolist() == [[NEG_INF, 2.0]]


def test_top_p_of_flat_and_peaked_rows_together() -> None:
    flat, peaked = 0.01 * random_logits(1, 5000), 3.0 * random_logits(1, 5000, seed=1)
    kept = filter_top_p(torch.cat([flat, peaked]), torch.tensor([0.9, 0.9]))
    assert torch.equal(kept[:1], filter_top_p(flat, torch.tensor([0.9])))
    assert torch.equal(kept[1:], filter_top_p(peaked, torch.tensor([0.9])))
    assert kept.isfinite().sum(dim=-1)[0] > 4000
    assert kept.isfinite().sum(dim=-1)[1] < 100


def test_top_p_counts_only_what_earlier_filters_left() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    after_top_k = filter_top_k(logits, torch.tensor([2]))
    # Among the two that are left the first has 0.625, enough for 0.6; among all three it has 0.5, not enough.
    assert filter_top_p(after_top_k, torch.tensor([0.6]))[0].isfinite().tolist() == [True, False, False]
    assert filter_top_p(logits, torch.tensor([0.6]))[0].isfinite().tolist() == [True, True, False]


def test_top_k_keeps_what_is_as_likely_as_the_kth() -> None:
    kept = filter_top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), torch.tensor([2]))
    assert kept.tolist() == [[1.0, 2.0, 1.0, NEG_INF]]


def test_filters_leave_their_input() -> None:
    logits = random_logits(2, 10)
    before = logits.clone()
    filter_min_p(logits, torch.tensor([0.5, 0.5]))
    filter_top_k(logits, torch.tensor([1, 1]))
    filter_top_p(logits, torch.tensor([0.5, 0.5]))
    assert torch.equal(logits, before)
