"""The ranks' private channel: in order, for those who have the key, and nobody's end goes unnoticed."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import stat
import threading
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from threads import wait_for_the_end
from workers.lockstep.channel import FollowerChannel, LeadChannel
from workers.parallel.errors import TensorParallelError

PATIENCE_S = 20.0


class Meeting:
    """A lead and its followers, who have met."""

    def __init__(self, size: int) -> None:
        self.lead = LeadChannel(size)
        self.lost: queue.SimpleQueue = queue.SimpleQueue()
        self.reports: queue.SimpleQueue = queue.SimpleQueue()
        self.leadless: queue.SimpleQueue = queue.SimpleQueue()
        self.followers: dict[int, FollowerChannel] = {}
        threads = [threading.Thread(target=self._come, args=(rank,)) for rank in range(size - 1, 0, -1)]
        for thread in threads:
            thread.start()
        self.said = self.lead.accept(PATIENCE_S)
        for thread in threads:
            thread.join()
        self.lead.listen(lambda rank, report: self.reports.put((rank, report)), self.lost.put)

    def _come(self, rank: int) -> None:
        seat = self.lead.seats[rank]
        self.followers[rank] = FollowerChannel(seat, f"rank {rank} is here", lambda: self.leadless.put(rank))


@pytest.fixture
def handshake():
    made = Meeting(3)
    yield made
    made.lead.close()
    for follower in made.followers.values():
        follower.close()


def test_inputs_go_to_every_follower_and_reports_to_the_lead_in_order(handshake):
    assert handshake.said == {1: "rank 1 is here", 2: "rank 2 is here"}
    for number in range(500):
        handshake.lead.send(("step", number))
        if number % 50 == 0:
            handshake.followers[2].report(number)
        assert [follower.receive() for follower in handshake.followers.values()] == [("step", number)] * 2
    assert [handshake.reports.get(timeout=PATIENCE_S) for _ in range(10)] == [(2, n) for n in range(0, 500, 50)]


def test_a_follower_that_goes_is_noticed(handshake):
    handshake.followers[1].close()
    assert handshake.lost.get(timeout=PATIENCE_S) == 1
    with pytest.raises(TensorParallelError, match="rank 1 is gone"):
        handshake.lead.send("step")
    assert handshake.leadless.empty()


def test_a_lead_that_goes_is_noticed_by_all_even_while_they_do_something_else(handshake):
    for connection in handshake.lead.connections:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)  # as when its process ends
    assert {handshake.leadless.get(timeout=PATIENCE_S) for _ in range(2)} == {1, 2}
    with pytest.raises(EOFError):
        handshake.followers[1].receive()


def test_an_end_in_good_order_is_no_loss(handshake):
    handshake.lead.close()
    for follower in handshake.followers.values():
        assert follower.receive() is None
    wait_for_the_end("lead-watcher", PATIENCE_S)
    assert handshake.leadless.empty()
    assert handshake.lost.empty()


def test_a_wrong_key_opens_nothing():
    lead = LeadChannel(2)
    seat = dataclasses.replace(lead.seats[1], key=b"guessed")
    refused: queue.SimpleQueue = queue.SimpleQueue()

    def come() -> None:
        try:
            FollowerChannel(seat, "hello", lambda: None)
        except (AuthenticationError, OSError, EOFError) as error:
            refused.put(error)

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(TensorParallelError, match="rank 1 did not come within"):
        lead.accept(0.3)
    assert isinstance(refused.get(timeout=PATIENCE_S), AuthenticationError | OSError | EOFError)
    thread.join()
    lead.close()


def test_nobody_else_can_reach_the_socket_and_it_is_gone_once_all_have_come(handshake):
    lead = LeadChannel(2)
    folder = Path(lead.seats[0].socket).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    lead.close()
    assert not folder.exists()
    assert not Path(handshake.lead.seats[0].socket).parent.exists()


def test_a_follower_that_does_not_come_is_named():
    lead = LeadChannel(3)
    with pytest.raises(TensorParallelError, match=r"rank 1, 2 did not come within 0\.05 s"):
        lead.accept(0.05)
    lead.close()
