"""A rank that follows is heard whatever its steps are at, until its process is frozen."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.lockstep import lead
from workers.lockstep.channel import FollowerChannel, LeadChannel
from workers.lockstep.lead import Follower, Lead
from workers.lockstep.pulse import SILENT_ROUNDS, Pulse, Pulses

PATIENCE_S = 20.0


def test_rounds_without_a_word_are_counted():
    pulses = Pulses(3)
    for _ in range(SILENT_ROUNDS):
        assert pulses.next_round() == ()
    pulses.hear(1)
    assert pulses.next_round() == (2,)
    pulses.hear(2)
    for _ in range(SILENT_ROUNDS - 1):
        assert pulses.next_round() == ()
    assert pulses.next_round() == (1,)
    assert pulses.next_round() == (1, 2)
    assert Pulses(1).next_round() == (), "there is nobody else"


def test_what_is_broken_on_any_rank_is_known_until_it_says_otherwise():
    pulses = Pulses(3)
    pulses.hear(1, Pulse({"prefill-0.a": "prefill-0.a#1"}))
    pulses.hear(2, Pulse({"prefill-1.b": "prefill-1.b#4"}))
    assert pulses.broken_peers == {"prefill-0.a": "prefill-0.a#1", "prefill-1.b": "prefill-1.b#4"}
    pulses.hear(1, Pulse())
    assert pulses.broken_peers == {"prefill-1.b": "prefill-1.b#4"}


class Rank:
    """A rank's connector and copy of the worker, of which nothing happens; a step may hang."""

    number = digest = 0
    broken_peers: dict[str, str]

    def __init__(self) -> None:
        self.worker = self
        self.broken_peers = {}
        self.steps_go_on, self.in_step = threading.Event(), threading.Event()

    def set_listener(self, wake) -> None:
        self.wake = wake

    def take_own(self) -> list:
        return []

    def run(self, given: object) -> list:
        self.in_step.set()
        self.steps_go_on.wait(PATIENCE_S)
        return []


@pytest.fixture
def pair(monkeypatch):
    """A lead and a follower over a real channel; the follower's pulse is quick."""
    monkeypatch.setattr(lead, "PULSE_S", 0.01)
    channel = LeadChannel(2)
    own, other, ends = Rank(), Rank(), []
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(FollowerChannel, channel.seats[1], "here", lambda: None)
        channel.accept(PATIENCE_S)
        follower_channel = coming.result()
    leading = Lead(own, own, channel, 2, ends.append)
    leading.listen(lambda: None)
    follower = Follower(other, other, follower_channel, ends.append)
    follower.start()
    yield leading, channel, other
    other.steps_go_on.set()
    channel.close()
    follower.join(PATIENCE_S)


def test_a_follower_is_heard_while_its_step_hangs(pair):
    leading, channel, other = pair
    channel.send("a step")
    assert other.in_step.wait(PATIENCE_S)
    for _ in range(3 * SILENT_ROUNDS):
        time.sleep(0.05)
        assert leading.silent_ranks() == ()


def test_a_connection_that_breaks_on_a_follower_is_known_to_the_lead(pair):
    leading, _, other = pair
    other.broken_peers = {"prefill-0.a": "prefill-0.a#1"}
    other.wake()
    give_up = time.monotonic() + PATIENCE_S
    while leading.broken_peers != other.broken_peers:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    other.broken_peers = {}
    while leading.broken_peers:
        assert time.monotonic() < give_up
        time.sleep(0.005)
