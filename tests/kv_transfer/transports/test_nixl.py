"""Real NIXL between real processes: over host memory, and on a GPU that both share."""

from __future__ import annotations

import random
import warnings
from itertools import product

import numpy as np
import pytest

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased, HandoffSent
from kv_transfer.errors import PeerError
from kv_transfer.handoff_key import HandoffKey

pytestmark = pytest.mark.nixl


def introduce(prefill, decode) -> tuple[str, str]:
    prefill_info, decode_info = prefill.info(), decode.info()
    prefill.connect(decode_info)
    decode.connect(prefill_info)
    try:
        assert prefill.probe(decode_info.engine_id) < 10
    except PeerError as error:  # seen once in some hundred meetings on a busy machine; pools then meet again, too
        warnings.warn(f"the first meeting failed: {error}", stacklevel=2)
        assert prefill.probe(decode_info.engine_id) < 10
    return prefill_info.engine_id, decode_info.engine_id


def hand_over(prefill, decode, ids, handoff_id: bytes, src, dst, token: int) -> None:
    prefill.begin(handoff_id, ids[1])
    key = decode.expect(handoff_id, ids[0], dst)
    for layer in range(4):
        prefill.push(handoff_id, layer, layer + 1, src)
    prefill.finish(handoff_id, token)
    assert decode.events(1) == [HandoffReceived(key, token)]
    (sent,) = prefill.events(1)
    assert isinstance(sent, HandoffSent)
    assert sent.num_parts == 4
    assert np.array_equal(decode.blocks(dst), prefill.blocks(src))


def test_blocks_arrive_whole(make_peer):
    prefill, decode = make_peer("prefill"), make_peer("decode")
    ids = introduce(prefill, decode)
    before = decode.blocks(range(64))
    hand_over(prefill, decode, ids, b"a" * 16, (1, 2, 3), (40, 7, 9), 11)
    hand_over(prefill, decode, ids, b"b" * 16, (60,), (0,), 12)
    untouched = [block for block in range(64) if block not in (40, 7, 9, 0)]
    assert np.array_equal(decode.blocks(range(64))[:, untouched], before[:, untouched])


def test_what_decode_has_already_is_not_written(make_peer):
    """Five blocks are pushed, four layers in two groups; the granted ones arrive, and nothing else changes."""
    prefill, decode = make_peer("prefill"), make_peer("decode")
    ids = introduce(prefill, decode)
    src = (1, 2, 3, 9, 8)
    for number, (first_block, grant_first) in enumerate(product((0, 1, 3, 5), (True, False))):
        prefill.fill(range(64), number)
        decode.fill(range(64), -1)
        handoff_id, dst = bytes([number]) * 16, (40, 7, 9, 10, 11)[first_block:]
        if grant_first:
            key = decode.expect(handoff_id, ids[0], dst, first_block)
        prefill.begin(handoff_id, ids[1])
        for first in (0, 2):
            prefill.push(handoff_id, first, first + 2, src)
        prefill.finish(handoff_id, 11)
        if not grant_first:
            key = decode.expect(handoff_id, ids[0], dst, first_block)
        assert decode.events(1) == [HandoffReceived(key, 11)]
        (sent,) = prefill.events(1)
        assert (sent.num_parts, sent.num_bytes) == (2 * bool(dst), len(dst) * prefill.blocks([0]).nbytes)
        assert decode.numbers(dst) == ([float(number)] if dst else [])
        assert decode.numbers([block for block in range(64) if block not in dst]) == [-1.0]


def test_a_killed_prefill_process(make_peer):
    lost, other, decode = make_peer("prefill-0"), make_peer("prefill-1"), make_peer("decode")
    lost_ids, other_ids = introduce(lost, decode), introduce(other, decode)
    lost.begin(b"a" * 16, lost_ids[1])
    key = decode.expect(b"a" * 16, lost_ids[0], (1, 2))
    lost.push(b"a" * 16, 0, 2, (1, 2))
    lost.kill()
    assert decode.events(1, 0.3) == [], "two of four layers are not a whole cache"
    decode.disconnect(lost_ids[0])
    failed, released = decode.events(2)
    assert isinstance(failed, HandoffFailed)
    assert "is gone" in failed.reason
    assert released == HandoffReleased(key)
    hand_over(other, decode, other_ids, b"b" * 16, (5, 6), (1, 2), 3)


def test_a_killed_decode_process(make_peer):
    prefill, lost, other = make_peer("prefill"), make_peer("decode-0"), make_peer("decode-1")
    lost_ids, other_ids = introduce(prefill, lost), introduce(prefill, other)
    prefill.begin(b"a" * 16, lost_ids[1])
    lost.expect(b"a" * 16, lost_ids[0], (1, 2))
    prefill.push(b"a" * 16, 0, 2, (1, 2))
    lost.kill()
    prefill.push(b"a" * 16, 2, 4, (1, 2))
    prefill.finish(b"a" * 16, 5)
    prefill.disconnect(lost_ids[1])
    (aborted,) = prefill.events(1)
    assert isinstance(aborted, HandoffAborted)
    hand_over(prefill, other, other_ids, b"b" * 16, (1, 2), (3, 4), 5)


def test_a_restarted_peer_is_a_new_peer(make_peer):
    decode = make_peer("decode")
    first = make_peer("prefill-0")
    first_ids = introduce(first, decode)
    first.kill()
    decode.disconnect(first_ids[0])
    second = make_peer("prefill-0")
    second_ids = introduce(second, decode)
    assert second_ids[0] != first_ids[0]
    hand_over(second, decode, second_ids, b"c" * 16, (9,), (8,), 1)


def test_a_meeting_measures_the_path_both_ways(make_peer):
    """What was measured decides: where layers are slow to send, and compute is long, each leaves at once."""
    prefill, decode = make_peer("prefill"), make_peer("decode")
    prefill_id, decode_id = introduce(prefill, decode)
    for end, other in ((prefill, decode_id), (decode, prefill_id)):
        assert end.layers_per_write(other, 1 << 40, 3600.0) == 1
        assert end.layers_per_write(other, 1, 0.0) == 4
        assert end.layers_per_write("nobody", 1, 0.0) == 1


def test_handoffs_with_random_cancels(make_peer, device):
    """Whatever is cancelled, and when: no wrong byte, and every block comes back."""
    rng = random.Random(3)
    prefill, decode = make_peer("prefill"), make_peer("decode")
    prefill_id, decode_id = introduce(prefill, decode)
    prefill.fill(range(64), 0)
    decode.fill(range(64), 0)
    free = {end: set(range(64)) for end in (prefill, decode)}
    sources: dict[bytes, list[int]] = {}
    targets: dict[HandoffKey, tuple[int, list[int]]] = {}
    received = 0
    target = 1200 if device == "cuda" else 100
    for number in range(1, target + 1):
        handoff_id, size = rng.randbytes(16), rng.randint(1, 12)
        while min(map(len, free.values())) < size:
            received += collect(prefill, decode, sources, targets, free)
        src, dst = (rng.sample(sorted(free[end]), size) for end in (prefill, decode))
        free[prefill] -= set(src)
        free[decode] -= set(dst)
        sources[handoff_id] = src
        prefill.hand_over(handoff_id, decode_id, src, number)
        key = decode.expect(handoff_id, prefill_id, dst)
        targets[key] = (number, dst)
        if rng.random() < 0.3:
            decode.cancel(key)
        if rng.random() < 0.1:
            prefill.abort(handoff_id)
    for _ in range(1000):
        received += collect(prefill, decode, sources, targets, free)
        if not sources and not targets:
            break
    assert [len(blocks) for blocks in free.values()] == [64, 64]
    assert target // 2 < received < target


def collect(prefill, decode, sources, targets, free) -> int:
    """Take what has happened; checks and clears the blocks that come back, and returns how many handoffs arrived."""
    received = 0
    for event in prefill.events(1, 0.01):
        free[prefill] |= set(sources.pop(event.handoff_id))
    for event in decode.events(1, 0.01):
        if isinstance(event, HandoffFailed):
            continue
        number, blocks = targets.pop(event.key)
        if isinstance(event, HandoffReceived):
            received += 1
            assert event.first_token == number
            assert decode.numbers(blocks) == [number]
        decode.fill(blocks, 0)
        free[decode] |= set(blocks)
    assert decode.numbers(free[decode]) in ([], [0.0]), "a free block was written to"
    return received
