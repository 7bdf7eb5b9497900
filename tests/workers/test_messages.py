"""One request for either role: what it brings is used, and what is missing is made."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest

from made_requests import worker_request
from workers.block_hashes import BlockHashes, PackedHashes, PromptHashes, block_hashes
from workers.messages import RequestOptions, WorkerRequest, shared_options
from workers.sampling_params import SamplingParams

PROMPT = range(100)


def hashed(block_size: int, salt: bytes = b"") -> PromptHashes:
    return PromptHashes(block_size, b"".join(block_hashes(PROMPT, block_size, salt)))


@pytest.mark.parametrize("given", [None, hashed(16), hashed(8)], ids=["none", "of this size", "of another size"])
def test_a_prompts_hashes_are_the_same_wherever_they_were_made(given):
    request = worker_request("r", PROMPT, block_hashes=given)
    assert tuple(request.hashes_for(16)) == block_hashes(PROMPT, 16)


def test_hashes_that_came_with_a_request_are_not_made_again(monkeypatch):
    request = worker_request("r", PROMPT, block_hashes=hashed(16))
    monkeypatch.setattr(BlockHashes, "extend", None)
    assert len(request.hashes_for(16)) == 6


def test_what_a_worker_goes_on_with_is_its_own():
    """Both workers of a request may be in one process: neither sees the other's blocks."""
    request = worker_request("r", PROMPT, block_hashes=hashed(16))
    one, other = request.hashes_for(16), request.hashes_for(16)
    one.extend(range(100, 132))
    assert (len(one), len(other)) == (8, 6)
    assert tuple(one[:6]) == tuple(other)


def test_a_request_goes_on_from_the_last_hash_as_if_all_were_hashed_at_once():
    hashes = worker_request("r", PROMPT, block_hashes=hashed(20)).hashes_for(20)
    hashes.extend(range(100, 140))
    assert tuple(hashes) == block_hashes(range(140), 20)


def test_requests_of_unlike_salts_share_no_hash():
    salts = [b"", b"a", b"b", block_hashes(PROMPT, 16)[0]]
    chains = [set(worker_request("r", PROMPT, cache_salt=salt).hashes_for(16)) for salt in salts]
    assert len(set.union(*chains)) == len(salts) * 6
    known = worker_request("r", PROMPT, cache_salt=b"a", block_hashes=hashed(16, b"a")).hashes_for(16)
    assert set(known) == chains[1]


def test_no_salt_can_be_chosen_so_that_a_sequence_goes_on_from_anothers_block():
    first, second = block_hashes(PROMPT, 16)[:2]
    before = block_hashes(PROMPT, 16)[0]
    forged = before + b"".join(token.to_bytes(4, "little") for token in range(16, 32))
    assert block_hashes(range(32, 48), 16, forged)[0] != block_hashes(range(48), 16)[2]
    assert first != second


def test_a_request_comes_out_of_a_pickle_as_it_went_in():
    sampling = SamplingParams(seed=1, max_tokens=4)
    request = worker_request(
        "r", PROMPT, sampling, "peer", attempt_id="a", num_output_tokens=3, priority=-2, user="ann", cache_salt=b"s",
        block_hashes=hashed(16),
    )  # fmt: skip
    copy = pickle.loads(pickle.dumps(request))
    for field in fields(WorkerRequest):
        one, other = getattr(request, field.name), getattr(copy, field.name)
        assert (one == other).all() if field.name == "prompt_token_ids" else one == other, field.name


def test_options_are_those_of_every_request():
    request = worker_request("r", PROMPT, priority=3, user="ann")
    assert shared_options(request) == {field.name: getattr(request, field.name) for field in fields(RequestOptions)}


def test_packed_hashes_are_a_sequence():
    whole = block_hashes(PROMPT, 16)
    packed = PackedHashes(b"".join(whole))
    assert (len(packed), tuple(packed), packed[-1], packed[2]) == (6, whole, whole[-1], whole[2])
    assert tuple(packed[1:4]) == whole[1:4]
    assert whole[3] in packed
    with pytest.raises(IndexError):
        packed[6]
    with pytest.raises(ValueError, match="steps of 1"):
        packed[::2]
