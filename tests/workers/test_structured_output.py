"""Answers in a form, from a pair of workers: valid whatever happens on the way, and nobody else's affair."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from tokenizers import Tokenizer

from benchmarks.made_schemas import made_schema
from lockstep_cluster import LockstepCluster
from workers.errors import InvalidRequestError, NoTokenLeftError
from workers.messages import FinishReason
from workers.runner.decode_runner import DecodeRunner
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput

LONG = StructuredOutput.regex("([0-9]{4}-){8}[a-f]{8}")


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("llama")


@pytest.fixture
def text_of(checkpoint):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.fixture
def cluster(local_cluster, checkpoint):
    """`cluster(**sizes)`: one that takes structured output."""
    return lambda **kwargs: local_cluster(checkpoint, grammars=True, **kwargs)


def sampling(wanted: StructuredOutput | None, seed: int = 0, **params: object) -> SamplingParams:
    values = {"temperature": 1.0, "max_tokens": 400, "structured_output": wanted, **params}
    return SamplingParams(seed=seed, **values)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(length)]


def schema_of(seed: int) -> dict:
    return made_schema(seed, depth=2)


def wanted_of(seed: int) -> StructuredOutput:
    return StructuredOutput.json_schema(schema_of(seed), disable_any_whitespace=True)


def check_answers(cluster, text_of, count: int) -> None:
    assert not cluster.failures
    for i in range(count):
        assert cluster.tokens[f"json{i}"][-1].finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text_of(cluster.token_ids(f"json{i}"))), schema_of(i))


@pytest.mark.parametrize("steps_ahead", [1])
def test_answers_to_schemas_are_valid_and_the_rest_of_the_batch_is_as_if_alone(cluster, text_of) -> None:
    count = 15
    mixed = cluster(max_num_seqs=20, decode_blocks=600, prefill_blocks=200)
    free = [sampling(None, seed=1, max_tokens=30, ignore_eos=True), sampling(None, temperature=0.0, max_tokens=30)]
    for i in range(count):
        mixed.submit(f"json{i}", prompt(9, i), sampling(wanted_of(i), seed=i))
    for i, params in enumerate(free):
        mixed.submit(f"free{i}", prompt(12, i), params)
    mixed.run()
    check_answers(mixed, text_of, count)
    mixed.assert_all_blocks_free()
    alone = cluster()
    for i, params in enumerate(free):
        alone.submit(f"free{i}", prompt(12, i), params)
    alone.submit("json3", prompt(9, 3), sampling(wanted_of(3), seed=3))
    for name, tokens in alone.run().items():
        assert tokens == mixed.token_ids(name), name


@pytest.mark.slow
@pytest.mark.parametrize("steps_ahead", [1])
def test_answers_to_two_hundred_schemas_are_valid(cluster, text_of) -> None:
    many = cluster(max_num_seqs=32, decode_blocks=1000, prefill_blocks=500)
    for i in range(200):
        many.submit(f"json{i}", prompt(9, i), sampling(wanted_of(i), seed=i))
    many.run(200_000)
    check_answers(many, text_of, 200)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_token_obeys_too(cluster, text_of, temperature: float) -> None:
    """It is sampled where the prompt is computed: on a prefill worker, or on the decode worker itself."""
    pair = cluster(decode_batched_tokens=64)
    wanted = StructuredOutput.choice(["q", "zebra"])
    for i in range(3):
        pair.submit(f"one{i}", prompt(20, i), sampling(wanted, seed=i, max_tokens=1, temperature=temperature))
        pair.submit_local(f"two{i}", prompt(20, i), sampling(wanted, seed=i, temperature=temperature))
    tokens = pair.run()
    assert not pair.failures
    assert all(text_of(tokens[f"one{i}"]) in ("q", "z") for i in range(3))
    assert {text_of(tokens[f"two{i}"]) for i in range(3)} <= {"q", "zebra"}


def test_a_mask_waits_for_the_token_before_and_no_step_waits_for_a_mask(cluster, monkeypatch, steps_ahead) -> None:
    """One step ahead the choice is queued when the token before it is known, and the forward pass before that."""
    order: list[str] = []
    launch = DecodeRunner.launch

    def noted(self, sequences):
        launched = launch(self, sequences)
        order.append("chosen" if launched.chosen else "computed")
        return launched

    monkeypatch.setattr(DecodeRunner, "launch", noted)
    pair = cluster()
    pair.submit("form", prompt(9), sampling(StructuredOutput.regex("[0-9]{6}")))
    pair.run()
    first, *others = order
    assert first == "chosen", "the first token is known"
    assert set(others) == ({"computed"} if steps_ahead else {"chosen"})
    assert len(order) == 6 + steps_ahead, "six tokens and the end, the first of them on prefill; one step too many"


@pytest.mark.parametrize("steps_ahead", [1])
def test_who_makes_room_comes_back_where_it_was(cluster, text_of) -> None:
    pair = cluster(decode_blocks=9)
    preempted = 0
    for i in range(4):
        pair.submit(f"r{i}", prompt(10 + i, i), sampling(LONG, seed=i))
    while pair.busy:
        pair.step()
        preempted = max(preempted, *(worker.load.preempted for worker in pair.decode.values()))
    assert preempted
    assert not pair.failures
    roomy = cluster()
    for i in range(4):
        roomy.submit(f"r{i}", prompt(10 + i, i), sampling(LONG, seed=i))
    assert roomy.run() == {f"r{i}": pair.token_ids(f"r{i}") for i in range(4)}


@pytest.mark.parametrize("steps_ahead", [1])
def test_all_ranks_of_a_worker_keep_to_the_form(checkpoint, cluster) -> None:
    alone, ranks = cluster(), LockstepCluster(checkpoint, size=2, steps_ahead=1, grammars=True)
    for pair in (alone, ranks):
        pair.submit("form", prompt(9), sampling(StructuredOutput.regex("[0-9]{8}"), logprobs=1))
        pair.submit("free", prompt(12, 1), sampling(None, max_tokens=12, ignore_eos=True, logit_bias=((9, 3.0),)))
    assert ranks.run() == alone.run()
    ranks.assert_equal_ranks()


@pytest.mark.parametrize("steps_ahead", [1])
@pytest.mark.parametrize("moved_after", [1, 17])
def test_another_worker_goes_on_in_the_middle(cluster, moved_after: int) -> None:
    params = sampling(LONG, seed=4, presence_penalty=0.5)
    whole = cluster()
    whole.submit("r", prompt(10), params)
    answer = whole.run()["r"]
    other = cluster(decode_batched_tokens=64)
    so_far = prompt(10) + answer[:moved_after]
    other.submit_local("r", so_far, params, num_output_tokens=moved_after)
    assert other.run()["r"] == answer[moved_after:]


def test_a_request_that_rules_everything_out_ends_alone_and_its_blocks_stay_known(cluster) -> None:
    pair = cluster()
    (prefill,) = pair.prefill.values()
    pair.submit("first", prompt(40), sampling(None, max_tokens=1))
    pair.run()
    stored = prefill.blocks.num_stored
    assert stored == 2
    pair.submit("other", prompt(40, 1), sampling(None, temperature=0.0, max_tokens=12, ignore_eos=True))
    pair.submit("r", prompt(40), sampling(StructuredOutput.regex("[0-9]+"), allowed_token_ids=(5,)))
    tokens = pair.run()
    assert isinstance(pair.failures["r"], NoTokenLeftError)
    assert len(tokens["other"]) == 12
    assert prefill.blocks.num_stored == stored + 2, "what was computed of both prompts is right"
    pair.assert_all_blocks_free()


def test_a_grammar_that_cannot_be_used_fails_its_request_alone(cluster) -> None:
    pair = cluster()
    pair.submit("bad", prompt(9), sampling(StructuredOutput.regex("(")))
    pair.submit("good", prompt(9), sampling(None, max_tokens=3, ignore_eos=True))
    assert len(pair.run()["good"]) == 3
    assert isinstance(pair.failures["bad"], InvalidRequestError)


def test_biases_and_bad_words_hold_in_every_step(cluster) -> None:
    """Greedy tokens of one request are ruled out in the next, until the answer has none of them."""
    pair = cluster()
    plain = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    pair.submit("plain", prompt(9), sampling(None, **plain))
    answer = pair.run()["plain"]
    few = (7, 8, 9, 11)
    pair.submit("few", prompt(9), sampling(None, **plain, allowed_token_ids=few))
    pair.submit("biased", prompt(9), sampling(None, **plain, logit_bias=((42, 100.0),)))
    pair.submit("banned", prompt(9), sampling(None, **plain, logit_bias=tuple((t, -100.0) for t in set(answer))))
    word = tuple(answer[2:5])
    pair.submit("word", prompt(9), sampling(None, **plain, bad_words_token_ids=(word, (answer[7],))))
    tokens = pair.run()
    assert set(tokens["few"]) <= set(few)
    assert set(tokens["biased"]) == {42}
    assert not set(tokens["banned"]) & set(answer)
    assert tokens["word"][:4] == answer[:4]
    assert tokens["word"][4] != answer[4]
    assert answer[7] not in tokens["word"]
    assert all(tuple(tokens["word"][i : i + 3]) != word for i in range(10))
