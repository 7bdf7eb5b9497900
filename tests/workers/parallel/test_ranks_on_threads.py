"""A lead's and a follower's own threads and their real channel: steps, ends and crashes."""

from __future__ import annotations

import queue
import threading

import pytest

from cache_groups import group_caches
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from made_requests import worker_request
from workers.commands import Abort, Submit
from workers.kv_cache.sizing import kv_layout
from workers.lockstep.channel import FollowerChannel, LeadChannel
from workers.lockstep.connector import AgreedConnector
from workers.lockstep.lead import Follower, Lead
from workers.lockstep.replica import Replica, StepClock
from workers.messages import StepOutput, TokenOutput
from workers.models.loader import load_model
from workers.parallel.errors import TensorParallelError
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams
from workers.worker_loop import WorkerLoop

PATIENCE_S = 20.0


class Running:
    """A prefill worker of two ranks that both compute with the whole model, each on a thread of its own."""

    def __init__(self, checkpoint) -> None:
        self.model = load_model(checkpoint, "float32", "cpu", 16)
        self.fabric = LocalFabric()
        self.outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self.crashes: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.channel = LeadChannel(2)
        self.follower: FollowerChannel | None = None
        joining = threading.Thread(target=self._follow, args=(self.channel.seats[1],))
        joining.start()
        self.channel.accept(PATIENCE_S)
        joining.join()
        self.lead_replica, connector = self._replica(0)
        self.lead = Lead(self.lead_replica, connector, self.channel, 2, self.crashes.put)
        self.loop = WorkerLoop("prefill-0.1", self.lead, self.outputs.put, self.crashes.put)
        self.lead.listen(self.loop.wake)
        self.loop.start()

    def _replica(self, rank: int) -> tuple[Replica, AgreedConnector]:
        clock = StepClock()
        connector = AgreedConnector(LocalConnector(self.fabric, threaded=True), rank)
        runner = ModelRunner(self.model, group_caches(self.model, 16))
        connector.register_kv_caches("prefill-0", runner.kv_caches, kv_layout(self.model.kv_cache_groups, 2))
        worker = PrefillWorker(
            runner, connector, max_num_batched_tokens=64, max_num_seqs=4, max_model_len=200, clock=clock
        )
        return Replica(worker, connector, clock), connector

    def _follow(self, seat) -> None:
        self.replica, connector = self._replica(1)
        self.follower = FollowerChannel(seat, "here", lambda: None)
        Follower(self.replica, connector, self.follower, self.ends.put).start()

    def ask(self, name: str) -> None:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=1)
        request = worker_request(name, (5, 6, 7), sampling, timeout_s=PATIENCE_S)
        self.loop.post(lambda lead: lead.take(Submit(request)))

    def answer(self) -> TokenOutput:
        while True:
            for event in self.outputs.get(timeout=PATIENCE_S).events:
                if isinstance(event, TokenOutput):
                    return event


@pytest.fixture
def running(tiny_checkpoint):
    instance = Running(tiny_checkpoint("llama"))
    yield instance
    instance.loop.stop()
    instance.channel.close()


def test_both_ranks_take_the_same_steps_until_the_lead_ends_them(running, tiny_checkpoint, reference_greedy):
    for number in range(5):
        running.ask(f"r{number}")
        assert running.answer().token_id == reference_greedy(tiny_checkpoint("llama"), [5, 6, 7], 1)[0]
    running.loop.post(lambda lead: lead.take(Abort("r0")))
    running.loop.stop()
    running.channel.close()
    assert running.ends.get(timeout=PATIENCE_S) is None
    assert running.replica.number == running.lead_replica.number
    assert running.replica.digest == running.lead_replica.digest
    assert running.crashes.empty()


def test_a_follower_that_crashes_ends_the_lead_with_its_reason(running, monkeypatch):
    def out_of_memory():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(running.replica.worker, "step", out_of_memory)
    running.ask("r")
    error = running.crashes.get(timeout=PATIENCE_S)
    assert isinstance(error, TensorParallelError)
    assert str(error) == "rank 1 crashed: RuntimeError: out of memory"
    assert isinstance(running.ends.get(timeout=PATIENCE_S), RuntimeError)


def test_a_follower_that_is_not_equal_ends_the_group(running):
    running.replica.digest ^= 1
    assert "no longer equal" in str(running.crashes.get(timeout=PATIENCE_S))
    assert "no longer equal" in str(running.ends.get(timeout=PATIENCE_S))


def test_a_follower_that_is_gone_is_told_while_the_lead_is_busy(running):
    """The lead may wait in a collective for the one who is gone: its loop would never find out."""
    release = threading.Event()
    running.loop.post(lambda lead: release.wait(PATIENCE_S))
    assert running.follower is not None
    running.follower.close()
    assert "rank 1 is gone" in str(running.crashes.get(timeout=PATIENCE_S))
    release.set()
