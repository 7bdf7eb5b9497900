"""Sampling parameters: what is refused, and where the arithmetic that uses them ends."""

from __future__ import annotations

import math

import pytest
import torch

from local_cluster import LocalCluster
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.validation import MIN_REPETITION_PENALTY, SMALLEST_FLOAT32, check_sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.5"), ("temperature", None), ("temperature", True), ("temperature", math.nan),
        ("temperature", math.inf), ("top_p", 0.0), ("top_p", [1]), ("top_k", 1.5), ("seed", -1), ("seed", 2**64),
        ("seed", "7"), ("max_tokens", 2.0), ("max_tokens", 0), ("min_tokens", False), ("logprobs", 21), ("stop", ("",)),
        ("stop", 7), ("stop", ("x", 7)), ("stop_token_ids", "7"), ("stop_token_ids", 7), ("stop_token_ids", (1.0,)),
        ("repetition_penalty", 0.0), ("presence_penalty", 2.5), ("frequency_penalty", {}),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_its_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name if value != ("",) else "empty"):
        SamplingParams(**{name: value})


def test_one_stop_string_and_lists_are_taken() -> None:
    assert SamplingParams(stop="END", stop_token_ids=[1, 2]) == SamplingParams(stop=("END",), stop_token_ids=(1, 2))


LEAVES_NO_TOKEN = [
    ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty is 5e-324"),
    ({"top_p": 1e-50}, "top_p is 1e-50"),
    ({"min_tokens": 1, "stop_token_ids": tuple(range(1, 512))}, "all 512 tokens"),
    ({"min_tokens": 1, "stop_token_ids": tuple(range(512)), "ignore_eos": True}, "all 512 tokens"),
]


def test_what_leaves_no_token_is_refused_and_the_cached_prefix_stays(tiny_checkpoint) -> None:
    cluster = LocalCluster(tiny_checkpoint("llama", eos_token_id=0))
    prompt = list(range(10, 74))
    cluster.submit("first", [*prompt, 7], SamplingParams(temperature=0.0, seed=0, max_tokens=2, ignore_eos=True))
    cluster.run()
    (worker,) = cluster.prefill.values()
    stored = worker.blocks.num_stored
    assert stored
    for n, (params, problem) in enumerate(LEAVES_NO_TOKEN):
        sampling = SamplingParams(**{"temperature": 0.0, "seed": 0, "max_tokens": 4, **params})
        cluster.submit(f"wrong {n}", [*prompt, 8], sampling)
        cluster.run()
        assert isinstance(cluster.failures[f"wrong {n}"], InvalidRequestError)
        assert problem in str(cluster.failures[f"wrong {n}"])
        assert worker.blocks.num_stored >= stored


def test_the_least_that_is_taken_can_be_reckoned_with_in_float32() -> None:
    check_sampling(SamplingParams(repetition_penalty=MIN_REPETITION_PENALTY, top_p=SMALLEST_FLOAT32), (), 512)
    assert (torch.tensor(1e32) / torch.tensor(MIN_REPETITION_PENALTY)).isfinite()
    assert torch.tensor(SMALLEST_FLOAT32) > 0
