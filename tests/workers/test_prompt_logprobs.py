"""Log-probabilities of prompts: those of transformers, whatever chunks they are computed in and what is cached."""

from __future__ import annotations

import random

import pytest
import torch

from local_cluster import LocalCluster
from made_requests import worker_request
from workers.errors import InvalidRequestError
from workers.messages import PromptLogprobs, TokenOutput
from workers.sampling import prompt_logprobs as scoring
from workers.sampling_params import SamplingParams


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def asked(num_top: int | None, **others) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=4, ignore_eos=True, prompt_logprobs=num_top, **others)


def events_of(worker, *requests) -> list:
    for request in requests:
        worker.add(request)
    events = []
    while worker.has_requests or worker.has_work:
        events += worker.step()
    return events


def check(found: PromptLogprobs, token_ids: list[int], num_top: int, reference) -> None:
    """They are the log-softmax of the reference's logits, and its most likely tokens."""
    expected = reference.logits(token_ids)[:-1].log_softmax(-1)
    own = expected.gather(1, torch.tensor(token_ids[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(torch.from_numpy(found.logprobs), own, rtol=1e-4, atol=1e-4)
    assert found.top_token_ids.shape == found.top_logprobs.shape == (len(token_ids) - 1, num_top)
    top = expected.topk(num_top)
    torch.testing.assert_close(torch.from_numpy(found.top_logprobs), top.values, rtol=1e-4, atol=1e-4)
    assert found.top_token_ids.tolist() == top.indices.tolist()


@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize(("family", "chunk"), [("llama", 256), ("gemma2", 16)])
def test_they_equal_transformers(family, chunk, where, tiny_checkpoint, reference, monkeypatch):
    """In one chunk and in many, some rows of logits at a time, beside prompts that ask for none."""
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 7 * 512)
    cluster = LocalCluster(tiny_checkpoint(family), max_num_batched_tokens=chunk, decode_batched_tokens=chunk)
    (worker,) = getattr(cluster, where).values()
    model = reference(tiny_checkpoint(family))
    for _ in range(2):  # the second time all of it is in the prefix cache
        events = events_of(
            worker,
            worker_request("other", prompt(20, 1), asked(None)),
            worker_request("r", prompt(70), asked(3)),
            worker_request("none", prompt(33, 2), asked(0)),
        )
        found = {event.request_id: event for event in events if isinstance(event, PromptLogprobs)}
        assert found.keys() == {"r", "none"}
        check(found["r"], prompt(70), 3, model)
        check(found["none"], prompt(33, 2), 0, model)
        kinds = [type(event) for event in events if event.request_id == "r"]
        assert kinds.index(PromptLogprobs) + 1 == kinds.index(TokenOutput), "just before the first token"
    cluster.assert_all_blocks_free()


def test_they_change_nothing_else(tiny_checkpoint, reference_greedy):
    cluster = LocalCluster(tiny_checkpoint("llama"), max_num_batched_tokens=32)
    cluster.submit("warm", prompt(70), asked(None))
    cluster.run()
    cluster.submit("r", prompt(70), asked(5))
    assert cluster.run()["r"] == reference_greedy(tiny_checkpoint("llama"), prompt(70), 4)
    assert cluster.decode_reports["r"].cached_tokens == 64, "decode still finds what it has"
    cluster.assert_all_blocks_free()


def test_a_prompt_of_one_token_has_none(tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("llama"))
    (worker,) = cluster.prefill.values()
    events = events_of(worker, worker_request("r", prompt(1), asked(2)))
    (found,) = (event for event in events if isinstance(event, PromptLogprobs))
    assert found.logprobs.shape == (0,)
    assert found.top_token_ids.shape == (0, 2)


@pytest.mark.parametrize("num_top", [-1, 21])
def test_what_is_out_of_range_is_refused(num_top):
    with pytest.raises(InvalidRequestError, match=rf"prompt_logprobs is {num_top}, it must be in \[0, 20\]"):
        asked(num_top)
