"""Sampling: the order of its parts, its distribution, and that it depends on nothing but the sequence."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from long_tails import slow_unless
from workers.errors import BatonError, SamplingError
from workers.sampling.ops.noise import gumbel_noise, noise_keys, noise_stream, signed
from workers.sampling.results import SampledToken
from workers.sampling.sampler import sample
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

EOS = 0


def state(output: Sequence[int] = (), prompt: Sequence[int] = (1, 2, 3), **params: object) -> SamplingState:
    sampling = SamplingParams(**{"seed": 0, **params})  # type: ignore[arg-type]
    return SamplingState(sampling, as_token_ids(prompt), frozenset({EOS}), 10_000, list(output))


def random_logits(rows: int, vocab_size: int = 100, seed: int = 0) -> torch.Tensor:
    return 2.0 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def token_ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def draw(logits: torch.Tensor, num_draws: int, **params: object) -> torch.Tensor:
    """How often each token is drawn over many seeds: (V,)."""
    states = [state(seed=seed, **params) for seed in range(num_draws)]
    drawn = token_ids(sample(logits.expand(num_draws, -1).contiguous(), states))
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[-1]).double()


def assert_distribution(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square at six standard deviations of its normal approximation; impossible tokens never occur."""
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = probs[possible].double() * counts.sum()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 6.0 * (2.0 * max(1, freedom)) ** 0.5


# Greedy


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.zeros(3, 40_000)
    logits[1, [77, 30_000]] = 5.0
    logits[2, [39_999, 20_001]] = 5.0
    assert token_ids(sample(logits, [state(temperature=0.0)] * 3)) == [0, 77, 20_001]
    # The same where the batch does not take the short way.
    mixed = [state(temperature=0.0, logprobs=0), *[state(temperature=0.0)] * 2]
    assert token_ids(sample(logits, mixed)) == [0, 77, 20_001]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = random_logits(1)
    assert token_ids(sample(logits, [state(temperature=1e-30)])) == [int(logits.argmax())]
    assert token_ids(sample(1e35 * logits, [state(temperature=2e-5)])) == [int(logits.argmax())]


def test_the_input_is_left_as_it_is() -> None:
    logits = random_logits(4)
    before = logits.clone()
    states = [
        state(temperature=0.0),
        state(top_k=3, top_p=0.5, min_p=0.1, temperature=0.3),
        state([5, 6], repetition_penalty=2.0, presence_penalty=1.0, min_tokens=9),
        state(logprobs=3),
    ]
    sample(logits, states)
    sample(logits[:1], states[:1])
    assert torch.equal(logits, before)
    assert states[2].output_token_ids == [5, 6]


def test_an_empty_batch_gives_nothing() -> None:
    assert sample(torch.empty(0, 10), []) == []


# Distribution

PROBS = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
NUM_DRAWS = 20_000


@pytest.mark.parametrize("temperature", slow_unless((1.7).__eq__, [0.5, 1.0, 1.7]))
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = draw(PROBS.log(), NUM_DRAWS, temperature=temperature)
    assert_distribution(counts, (PROBS.log() / temperature).softmax(dim=-1))


def test_draws_of_one_sequence_follow_the_softmax_over_its_tokens() -> None:
    states = [state([1] * index, seed=2**64 - 1) for index in range(5_000)]
    drawn = token_ids(sample(PROBS.log().expand(len(states), -1).contiguous(), states))
    assert_distribution(torch.bincount(torch.tensor(drawn), minlength=len(PROBS)).double(), PROBS)


@pytest.mark.parametrize(
    "params",
    slow_unless(
        lambda params: len(params) > 1 or "top_p" in params,
        [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.8, "min_p": 0.05, "top_k": 5, "top_p": 0.8}],
    ),
    ids=str,
)
def test_filtered_draws_follow_the_filtered_softmax(params: dict[str, float]) -> None:
    scores = PROBS.log().unsqueeze(0)
    scores = TemperatureLogitsWarper(params.get("temperature", 1.0))(None, scores)
    if "min_p" in params:
        scores = MinPLogitsWarper(params["min_p"])(None, scores)
    if "top_k" in params:
        scores = TopKLogitsWarper(int(params["top_k"]))(None, scores)
    if "top_p" in params:
        scores = TopPLogitsWarper(params["top_p"])(None, scores)
    assert_distribution(draw(PROBS.log(), NUM_DRAWS, **params), scores[0].softmax(dim=-1))


def test_penalties_come_before_temperature_and_filters() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0])
    output = [0, 0, 3]
    scores = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([output]), logits.unsqueeze(0).clone())[0]
    scores -= torch.tensor([2 * 0.4, 0.0, 0.0, 0.4]) + torch.tensor([0.3, 0.0, 0.0, 0.3])
    scores = TopKLogitsWarper(2)(None, (scores / 0.7).unsqueeze(0))[0]
    params = {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3}
    states = [state(output, prompt=(0,), seed=seed, temperature=0.7, top_k=2, **params) for seed in range(NUM_DRAWS)]
    drawn = token_ids(sample(logits.expand(NUM_DRAWS, -1).contiguous(), states))
    assert_distribution(torch.bincount(torch.tensor(drawn), minlength=4).double(), scores.softmax(dim=-1))


def noise_of(keys: Sequence[int], vocab_size: int) -> torch.Tensor:
    return gumbel_noise(torch.tensor([signed(key) for key in keys]), vocab_size)


def noise_for(seeds: Sequence[int], indices: Sequence[int], vocab_size: int) -> torch.Tensor:
    streams = torch.tensor([signed(noise_stream(seed)) for seed in seeds])
    return gumbel_noise(noise_keys(streams, torch.tensor(indices)), vocab_size)


def test_gumbel_noise_has_the_moments_of_its_distribution() -> None:
    noise = noise_for(range(50), [0] * 50, 20_000).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.02)
    # Neighbouring tokens, neighbouring indices and neighbouring seeds are uncorrelated.
    by_index = noise_for([7] * 50, range(50), 20_000).double()
    for a, b in [
        (noise[:, 1:], noise[:, :-1]),
        (noise[1:], noise[:-1]),
        (by_index[1:], by_index[:-1]),
    ]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 0.01


def test_noise_is_that_of_splitmix64() -> None:
    """Against the algorithm in plain integers, over more rows and entries than one chunk holds."""

    def splitmix64(value: int) -> int:
        mask = 2**64 - 1
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    keys = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    vocab_size = 1_000_003
    noise = noise_of(keys, vocab_size)
    for row, key in enumerate(keys):
        for entry in (0, 1, 77, vocab_size - 1):
            bits = splitmix64((key + (entry + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11
            uniform = torch.tensor((bits + 0.5) * 2.0**-53, dtype=torch.float64)
            expected = -torch.log(-torch.log1p(-uniform))
            torch.testing.assert_close(noise[row, entry].double(), expected, rtol=1e-4, atol=1e-4)
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    for seed, index in [(0, 0), (5, 3), (2**64 - 1, 100_000)]:
        stream = splitmix64((seed + 0x9E3779B97F4A7C15) % 2**64)
        key = splitmix64((stream + (index + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert noise_keys(torch.tensor([signed(noise_stream(seed))]), torch.tensor([index])).item() == signed(key)


def test_noise_is_finite_for_the_extreme_random_numbers() -> None:
    """The keys whose first 64 random bits are all 0 and all 1, by running the generator backwards."""

    def unshift(value: int, bits: int) -> int:
        result = value
        for _ in range(64 // bits):
            result = value ^ (result >> bits)
        return result

    for bits in (0, 2**64 - 1):
        key = unshift(bits, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        key = unshift(key, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        noise = noise_of([(unshift(key, 30) - 0x9E3779B97F4A7C15) % 2**64], 1).item()
        assert noise == pytest.approx(37.4 if bits == 0 else -2.81, abs=0.1)


# Independence of everything else

MIXED = [
    {"seed": 1},
    {"seed": 1, "top_p": 0.8},
    {"seed": 2, "top_k": 10},
    {"seed": 3, "min_p": 0.05, "temperature": 1.5},
    {"seed": 4, "temperature": 0.0},
    {"seed": 5, "presence_penalty": 1.0, "repetition_penalty": 1.2, "top_p": 0.9},
    {"seed": 6, "min_tokens": 50, "logprobs": 2},
    {"seed": 7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
]


def fake_model(history: Sequence[int], vocab_size: int = 64) -> torch.Tensor:
    """Logits that depend on the whole history, like a model's: (V,)."""
    generator = torch.Generator().manual_seed(hash(tuple(history)) % 2**31)
    return 2.0 * torch.randn(vocab_size, generator=generator)


def generate(states: list[SamplingState], num_tokens: int) -> None:
    for _ in range(num_tokens):
        logits = torch.stack([fake_model((*s.prompt_token_ids, *s.output_token_ids)) for s in states])
        for one, token in zip(states, sample(logits, states), strict=True):
            one.output_token_ids.append(token.token_id)


def test_the_same_seed_gives_the_same_tokens_whatever_is_in_the_batch() -> None:
    alone = [state(prompt=(9,), **params) for params in MIXED]
    for one in alone:
        generate([one], 30)
    together = [state(prompt=(9,), **params) for params in MIXED]
    generate(together, 30)
    backwards = [state(prompt=(9,), **params) for params in reversed(MIXED)]
    generate(backwards, 30)
    expected = [one.output_token_ids for one in alone]
    assert [one.output_token_ids for one in together] == expected
    assert [one.output_token_ids for one in reversed(backwards)] == expected
    assert len({tuple(tokens) for tokens in expected}) > 4


@pytest.mark.parametrize("split", [1, 7, 29])
def test_a_sequence_that_changes_workers_goes_on_the_same(split: int) -> None:
    whole = [state(prompt=(9,), **params) for params in MIXED]
    generate(whole, 30)
    first = [state(prompt=(9,), **params) for params in MIXED]
    generate(first, split)
    second = [state(one.output_token_ids, prompt=(9,), **params) for one, params in zip(first, MIXED, strict=True)]
    generate(second, 30 - split)
    assert [one.output_token_ids for one in second] == [one.output_token_ids for one in whole]


def test_other_seeds_give_other_tokens() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {token_ids(sample(logits, [state(seed=seed)]))[0] for seed in (0, 1, 2, 2**32, 2**63, 2**64 - 1)}
    assert len(tokens) >= 5


# min_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_holds_back_every_token_that_ends_the_text(temperature: float) -> None:
    logits = torch.full((1, 6), -20.0)
    logits[0, [EOS, 4]] = 20.0
    logits[0, 5] = 0.0
    params = {"min_tokens": 3, "stop_token_ids": (4, 10**9), "temperature": temperature}
    for num_output in range(3):
        assert token_ids(sample(logits, [state([1] * num_output, **params)])) == [5]
    assert token_ids(sample(logits, [state([1] * 3, **params)]))[0] in (EOS, 4)


def test_min_tokens_lets_an_ignored_eos_through() -> None:
    logits = torch.zeros(1, 6)
    logits[0, EOS] = 20.0
    assert token_ids(sample(logits, [state(min_tokens=3, ignore_eos=True, temperature=0.0)])) == [EOS]


def test_min_tokens_that_leaves_no_token_is_an_error() -> None:
    with pytest.raises(SamplingError, match="masked"):
        sample(torch.zeros(1, 2), [state(min_tokens=1, stop_token_ids=(1,))])


# Log-probabilities


def test_logprobs_are_of_the_raw_logits_and_sorted() -> None:
    logits = random_logits(4, seed=5)
    reference = logits.log_softmax(dim=-1)
    states = [
        state(logprobs=5, temperature=0.0),
        state(logprobs=0, temperature=2.0, top_k=3),
        state(),
        state([int(logits[3].argmax())], logprobs=2, temperature=0.0, presence_penalty=2.0, repetition_penalty=9.0),
    ]
    tokens = sample(logits, states)
    for row, n in [(0, 5), (1, 0), (3, 2)]:
        token, top = tokens[row], tokens[row].top_logprobs
        assert token.logprob == pytest.approx(reference[row, token.token_id].item(), abs=1e-5)
        expected = reference[row].topk(n)
        assert [entry.token_id for entry in top] == expected.indices.tolist()
        assert [entry.logprob for entry in top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert tokens[2].logprob is None
    assert tokens[2].top_logprobs == ()
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob
    # The penalised favourite was not chosen, yet it still leads the model's own distribution.
    assert tokens[3].token_id != tokens[3].top_logprobs[0].token_id


def test_the_chosen_logprob_comes_even_if_the_token_is_not_among_the_top() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.9]])
    (token,) = sample(logits, [state([0, 1, 2], logprobs=2, temperature=0.0, presence_penalty=2.0, prompt=())])
    assert token.token_id == 0
    (token,) = sample(logits, [state([0, 0, 1, 2], logprobs=2, temperature=0.0, frequency_penalty=2.0)])
    assert token.token_id == 3
    assert token.logprob == pytest.approx(logits.log_softmax(-1)[0, 3].item(), abs=1e-6)
    assert [entry.token_id for entry in token.top_logprobs] == [0, 1]


def test_more_logprobs_than_the_vocabulary_has() -> None:
    (token,) = sample(torch.zeros(1, 3), [state(logprobs=20)])
    assert len(token.top_logprobs) == 3


# Errors


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unusable_logits_are_an_error_that_names_the_row(params: dict[str, object], value: float) -> None:
    logits = random_logits(3)
    logits[1, 50] = value
    states = [state(**params) for _ in range(3)]
    with pytest.raises(SamplingError, match="NaN or infinity") as caught:
        sample(logits, states)
    assert caught.value.rows == (1,)
    # The others can be sampled again, and get what they would have got.
    good = sample(logits[[0, 2]], [states[0], states[2]])
    assert token_ids(good) == token_ids(sample(random_logits(3)[[0, 2]], [states[0], states[2]]))


def test_nan_is_an_error_even_where_it_is_masked() -> None:
    logits = random_logits(1)
    logits[0, EOS] = float("nan")
    with pytest.raises(SamplingError):
        sample(logits, [state(min_tokens=1)])


def test_a_row_of_minus_infinity_is_an_error_and_a_masked_token_is_not() -> None:
    logits = torch.full((1, 4), float("-inf"))
    for params in ({"temperature": 0.0}, {}):
        with pytest.raises(SamplingError):
            sample(logits, [state(**params)])
        logits_with_one = logits.clone()
        logits_with_one[0, 2] = -3.0
        assert token_ids(sample(logits_with_one, [state(**params)])) == [2]


def test_the_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(SamplingError("text", rows=(1, 2))))
    assert isinstance(error, BatonError)
    assert (str(error), error.rows) == ("text", (1, 2))


@pytest.mark.parametrize("logits", [torch.zeros(2, 5), torch.zeros(5), torch.zeros(1, 5, dtype=torch.int32)])
def test_logits_of_another_shape_or_dtype_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected floats"):
        sample(logits, [state()])
