"""What the ranks have seen of a handoff, in any order, becomes one event for all of them."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from kv_transfer.connector import (
    HandoffAborted,
    HandoffFailed,
    HandoffReceived,
    HandoffReleased,
    HandoffSent,
)
from kv_transfer.handoff_key import HandoffKey
from workers.lockstep.agreement import Abandon, Agreement
from workers.parallel.errors import TensorParallelError

KEY = HandoffKey(b"k" * 16, 0, 1)
OTHER = HandoffKey(b"o" * 16, 0, 2)
ID = b"h" * 16

RECEIVED = (HandoffReceived(KEY, 7),)
FAILED = (HandoffFailed(KEY, "a part was lost"), HandoffReleased(KEY))
CANCELLED = (HandoffReleased(KEY),)
SENT = (HandoffSent(ID, 100, 3, 0.5, 0.1),)
ABORTED = (HandoffAborted(ID, "the peer is gone"),)


def orders(*ranks: tuple) -> list[list[tuple[int, object]]]:
    """Every order in which the ranks' events can be reported: each rank's own stay in order."""
    turns = [rank for rank, events in enumerate(ranks) for _ in events]
    found = []
    for order in sorted(set(permutations(turns))):
        streams = [iter(events) for events in ranks]
        found.append([(rank, next(streams[rank])) for rank in order])
    return found


def outcome(order: list[tuple[int, object]], size: int) -> list[object]:
    agreement = Agreement(size)
    events = [event for rank, event in order for event in agreement.report(rank, [event])]
    assert agreement.num_open == 0
    return events


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((RECEIVED, RECEIVED), [HandoffReceived(KEY, 7)]),
        ((RECEIVED, RECEIVED, RECEIVED), [HandoffReceived(KEY, 7)]),
        ((CANCELLED, CANCELLED), [HandoffReleased(KEY)]),
        ((RECEIVED, CANCELLED), [HandoffReleased(KEY)]),
        ((FAILED, RECEIVED), [HandoffFailed(KEY, "a part was lost"), HandoffReleased(KEY)]),
        ((FAILED, FAILED), [HandoffFailed(KEY, "a part was lost"), HandoffReleased(KEY)]),
        ((FAILED, CANCELLED, RECEIVED), [HandoffFailed(KEY, "a part was lost"), HandoffReleased(KEY)]),
    ],
)
def test_decode_gets_the_worst_once_in_every_order(ranks, expected):
    for order in orders(*ranks):
        assert outcome(order, len(ranks)) == expected, order


def test_a_failure_is_told_at_once_and_the_release_when_no_rank_can_be_written_to():
    agreement = Agreement(2)
    assert agreement.report(1, [HandoffFailed(KEY, "lost")]) == [HandoffFailed(KEY, "lost")]
    assert agreement.report(1, [HandoffReleased(KEY)]) == []
    assert agreement.report(0, [HandoffReceived(KEY, 7)]) == [HandoffReleased(KEY)]


def test_one_failure_is_told_of_several():
    agreement = Agreement(2)
    assert agreement.report(0, [HandoffFailed(KEY, "one")]) == [HandoffFailed(KEY, "one")]
    assert agreement.report(1, [HandoffFailed(KEY, "two"), HandoffReleased(KEY)]) == []
    assert agreement.report(0, [HandoffReleased(KEY)]) == [HandoffReleased(KEY)]


def test_different_first_tokens_are_a_failure():
    agreement = Agreement(2)
    agreement.report(0, [HandoffReceived(KEY, 7)])
    failed, released = agreement.report(1, [HandoffReceived(KEY, 8)])
    assert isinstance(failed, HandoffFailed)
    assert "different first tokens: 7, 8" in failed.reason
    assert released == HandoffReleased(KEY)


def test_prefill_sums_what_was_sent_and_takes_the_longest_times():
    agreement = Agreement(3)
    assert agreement.report(2, [HandoffSent(ID, 10, 2, 0.3, 0.0)]) == []
    assert agreement.report(0, [HandoffSent(ID, 20, 3, 0.1, 0.2)]) == []
    assert agreement.report(1, [HandoffSent(ID, 30, 2, 0.2, 0.1)]) == [HandoffSent(ID, 60, 7, 0.3, 0.2)]


def test_an_abort_on_one_rank_has_the_others_give_up_and_ends_when_they_have():
    for order in orders(ABORTED, SENT, ABORTED):
        events = outcome(order, 3)
        assert events[-1] == HandoffAborted(ID, "the peer is gone")
        assert events[:-1] == [Abandon(ID, "the peer is gone")]


def test_a_rank_that_aborts_last_has_nobody_to_give_up():
    agreement = Agreement(2)
    agreement.report(0, SENT)
    assert agreement.report(1, ABORTED) == [HandoffAborted(ID, "the peer is gone")]


def test_handoffs_end_each_for_itself():
    agreement = Agreement(2)
    assert agreement.report(0, [HandoffReceived(KEY, 7), HandoffReceived(OTHER, 8)]) == []
    assert agreement.report(1, [HandoffReceived(OTHER, 8)]) == [HandoffReceived(OTHER, 8)]
    assert agreement.num_open == 1
    assert agreement.report(1, [HandoffReceived(KEY, 7)]) == [HandoffReceived(KEY, 7)]


def test_a_second_end_of_the_same_handoff_is_an_error():
    agreement = Agreement(2)
    agreement.report(0, RECEIVED)
    with pytest.raises(TensorParallelError, match="rank 0 reports a second end"):
        agreement.report(0, CANCELLED)


def test_many_handoffs_in_random_order_all_end_once():
    rng = random.Random(1)
    size, agreement = 4, Agreement(4)
    streams: list[list[object]] = [[] for _ in range(size)]
    for number in range(300):
        key = HandoffKey(number.to_bytes(16, "big"), 0, number)
        for stream in streams:
            stream += rng.choice(
                [[HandoffReceived(key, 1)], [HandoffReleased(key)], [HandoffFailed(key, "x"), HandoffReleased(key)]]
            )
    ended: list[HandoffKey] = []
    failed: set[HandoffKey] = set()
    while any(streams):
        rank = rng.choice([rank for rank, stream in enumerate(streams) if stream])
        count = rng.randint(1, 5)
        for event in agreement.report(rank, streams[rank][:count]):
            if isinstance(event, HandoffFailed):
                assert event.key not in failed
                assert event.key not in ended
                failed.add(event.key)
            else:
                ended.append(event.key)
                assert not (isinstance(event, HandoffReceived) and event.key in failed)
        del streams[rank][:count]
    assert len(ended) == len(set(ended)) == 300
    assert agreement.num_open == 0
