"""Requests follow from the seed and their number, and fit the model."""

import pytest

from benchmarks.distributions import Distribution, Fixed, LogNormal, Uniform
from benchmarks.workload import RequestSpec, Workload
from cluster.recall import NAMES
from workers.errors import ConfigError


def workload(
    prompt: Distribution, output: Distribution, *, seed: int = 3, max_model_len: int = 512, prompts: str = "random"
) -> Workload:
    return Workload(prompt, output, seed, vocab_size=90, max_model_len=max_model_len, prompts=prompts)


def lengths(spec: RequestSpec) -> tuple[int, int]:
    assert spec.token_ids is not None
    assert spec.sampling.max_tokens is not None
    return len(spec.token_ids), spec.sampling.max_tokens


def test_a_request_depends_on_seed_and_number_alone() -> None:
    one, same, other = (workload(Uniform(5, 50), LogNormal(20, 1), seed=seed) for seed in (3, 3, 4))
    forwards = [one.request(i) for i in range(20)]
    assert forwards == [same.request(i) for i in reversed(range(20))][::-1]
    assert forwards != [other.request(i) for i in range(20)]
    assert len({spec.token_ids for spec in forwards}) == 20
    assert len({spec.sampling.seed for spec in forwards}) == 20


def test_prompts_are_ids_of_the_vocabulary() -> None:
    spec = workload(Fixed(400), Fixed(1)).request(0)
    assert spec.text is None
    assert spec.token_ids is not None
    assert min(spec.token_ids) >= 0
    assert 80 < max(spec.token_ids) < 90


def test_what_does_not_fit_is_cut() -> None:
    cut = workload(Uniform(10, 1000), Uniform(8, 100), max_model_len=64)
    found = [lengths(cut.request(i)) for i in range(200)]
    assert all(prompt + output <= 64 and output >= 8 for prompt, output in found)
    assert max(prompt for prompt, _ in found) == 56
    assert any(output > 8 for _, output in found)


def test_a_workload_that_can_never_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"600 tokens.*512"):
        workload(Fixed(500), Fixed(100))


def test_recall_prompts_have_an_answer_in_the_list_and_about_the_length_asked_for() -> None:
    for index in range(30):
        spec = workload(Uniform(10, 200), Fixed(6), prompts="recall").request(index)
        assert spec.token_ids is None
        assert spec.text is not None
        assert spec.answer is not None
        listing, _, question = spec.text.partition("; ")
        entries = dict(entry.split(" ") for entry in listing.split(", "))
        assert entries[question.removesuffix("?")] == spec.answer
        assert set(entries) <= set(NAMES)
        assert len(entries) <= 64
