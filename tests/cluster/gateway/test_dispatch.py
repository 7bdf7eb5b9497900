"""What workers are sent is what was asked for, with the hashes that each of them can use."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.gateway.attempt import Attempt
from cluster.gateway.dispatch import dispatch
from cluster.routing.prefix_index import PromptPrefix
from made_requests import engine_request
from workers.block_hashes import block_hashes
from workers.messages import RequestOptions, WorkerRequest
from workers.token_ids import NO_TOKENS, as_token_ids

PROMPT = range(100)


class Worker:
    """A replica as it is dispatched to."""

    def __init__(self, engine_id: str, block_size: int) -> None:
        self.engine_id, self.block_size = engine_id, block_size
        self.sent: list[WorkerRequest] = []
        self.handle = SimpleNamespace(submit=self.sent.append)


@pytest.fixture
async def attempt() -> Attempt:
    return Attempt("attempt", "p", "d", 100, 0.0, 1)


async def test_every_option_reaches_both_workers_as_it_is(attempt):
    request = engine_request("r", PROMPT, priority=-2, user="ann", cache_salt=b"s")
    prefill, decode = Worker("p", 16), Worker("d", 16)
    dispatch(attempt, request, NO_TOKENS, None, 5.0, prefill, decode)
    (one,), (other,) = prefill.sent, decode.sent
    for sent, peer in ((one, "d"), (other, "p")):
        for field in fields(RequestOptions):
            if field.name != "timeout_s":
                assert getattr(sent, field.name) is getattr(request, field.name)
        assert (sent.timeout_s, sent.attempt_id, sent.peer_engine, sent.num_output_tokens) == (5.0, "attempt", peer, 0)
        assert sent.prompt_token_ids is request.prompt_token_ids, "nothing is copied"
    assert one.handoff_id == other.handoff_id


async def test_each_worker_is_sent_the_hashes_of_its_own_block_size_if_they_are_there(attempt):
    prefix = PromptPrefix(as_token_ids(PROMPT))
    prefix.prepare([16, 8])
    prefill, decode = Worker("p", 16), Worker("d", 32)
    dispatch(attempt, engine_request("r", PROMPT), NO_TOKENS, prefix, 5.0, prefill, decode)
    assert prefill.sent[0].block_hashes.digests == b"".join(block_hashes(PROMPT, 16))
    assert decode.sent[0].block_hashes is None
    assert tuple(decode.sent[0].hashes_for(32)) == block_hashes(PROMPT, 32), "it makes them itself"


async def test_one_that_goes_on_has_its_output_behind_its_prompt_and_hashed(attempt):
    prefix, output = PromptPrefix(as_token_ids(PROMPT)), as_token_ids(range(200, 230))
    prefix.prepare([16])
    decode = Worker("d", 16)
    dispatch(attempt, engine_request("r", PROMPT), output, prefix.followed_by(output), 5.0, None, decode)
    (sent,) = decode.sent
    whole = [*PROMPT, *range(200, 230)]
    assert (sent.prompt_token_ids.tolist(), sent.num_output_tokens, sent.peer_engine) == (whole, 30, None)
    assert sent.prompt_token_ids.dtype == np.int32
    assert sent.block_hashes.digests == b"".join(block_hashes(whole, 16))
    assert prefix.carried(16).digests == b"".join(block_hashes(PROMPT, 16)), "those of the prompt alone are as before"
