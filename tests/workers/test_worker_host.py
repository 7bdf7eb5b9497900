"""A worker built from its configuration, on threads of its own, over a fabric of this process."""

from __future__ import annotations

import queue
import random

import pytest

from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from made_requests import worker_request
from workers.config import WorkerConfig
from workers.errors import CheckpointError, ConfigError
from workers.messages import DecodeReport, HandoffReport, PrefillReport, TokenOutput
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams
from workers.worker_host import WorkerHost

PATIENCE_S = 30.0


class Running:
    """A prefill and a decode host that have met."""

    def __init__(self, checkpoint, **settings) -> None:
        self.fabric = LocalFabric()
        self.outputs: queue.SimpleQueue = queue.SimpleQueue()
        self.crashes: queue.SimpleQueue = queue.SimpleQueue()
        self.hosts: dict[str, WorkerHost] = {}
        for role in ("prefill", "decode"):
            config = WorkerConfig(f"{role}-0", role, str(checkpoint), dtype="float32", num_blocks=128, **settings)
            connector = LocalConnector(self.fabric, threaded=True)
            self.hosts[role] = WorkerHost(config, connector, self.outputs.put, self.crashes.put)
        for one, other in (("prefill", "decode"), ("decode", "prefill")):
            self.hosts[one].connect(self.hosts[other].info.engines, PATIENCE_S)
        self.loads = {}

    def submit(self, name: str, prompt: list[int], sampling: SamplingParams) -> None:
        ids = {role: host.info.engine.engine_id for role, host in self.hosts.items()}
        self.hosts["decode"].submit(worker_request(name, prompt, sampling, ids["prefill"], timeout_s=PATIENCE_S))
        self.hosts["prefill"].submit(worker_request(name, prompt, sampling, ids["decode"], timeout_s=PATIENCE_S))

    def collect(self, done) -> list:
        """Everything said until `done(events)`."""
        events: list = []
        while not done(events):
            output = self.outputs.get(timeout=PATIENCE_S)
            events += output.events
            self.loads[output.engine_id] = output.load
        return events

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


@pytest.fixture
def running(tiny_checkpoint):
    instance = Running(tiny_checkpoint("llama"), max_model_len=512, max_num_batched_tokens=32)
    yield instance
    instance.close()


def of_type(events, kind) -> list:
    return [event for event in events if isinstance(event, kind)]


def test_requests_are_served_and_everything_comes_back(running, reference_greedy, tiny_checkpoint):
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=10, ignore_eos=True)
    rng = random.Random(0)
    prompts = {f"r{i}": [rng.randrange(3, 512) for _ in range(rng.randint(1, 100))] for i in range(6)}
    for name, prompt in prompts.items():
        running.submit(name, prompt, sampling)
    events = running.collect(
        lambda events: len(of_type(events, TokenOutput)) == 60 and len(of_type(events, HandoffReport)) == 6
    )
    for name, prompt in prompts.items():
        # The hosts run on their own threads: a decoded token may be heard of before the first one.
        tokens = [event.token_id for event in of_type(events, TokenOutput) if event.request_id == name]
        assert sorted(tokens) == sorted(reference_greedy(tiny_checkpoint("llama"), prompt, 10))
    assert len(of_type(events, PrefillReport)) == len(of_type(events, DecodeReport)) == 6
    running.collect(lambda _: all(load.free_blocks == load.total_blocks for load in running.loads.values()))
    assert running.crashes.empty()


def test_what_a_worker_says_of_itself(running):
    for role, host in running.hosts.items():
        info = host.info
        assert (info.name, info.role, info.device) == (f"{role}-0", role, "cpu")
        assert (info.num_blocks, info.max_model_len) == (128, 512)
        assert info.engine.engine_id.startswith(f"{role}-0.")
        (group,) = info.engine.layout.groups
        assert (group.block_size, group.dtype, group.num_layers, group.num_kv_heads) == (16, "float32", 3, 2)
    assert running.hosts["prefill"].info.step_times.prefill
    assert running.hosts["decode"].info.step_times.decode
    one, other = (host.info.engine for host in running.hosts.values())
    assert one.incarnation != other.incarnation


def test_peers_answer_each_other(running):
    prefill, decode = running.hosts["prefill"], running.hosts["decode"]
    assert prefill.probe(decode.info.engine.engine_id, PATIENCE_S) < PATIENCE_S


def test_an_unexpected_error_is_told_and_the_host_can_be_closed(running, monkeypatch):
    def out_of_memory(self, rows, on_layer=None):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ModelRunner, "forward", out_of_memory)
    running.submit("r", [5, 6, 7], SamplingParams(seed=0, max_tokens=2))
    assert str(running.crashes.get(timeout=PATIENCE_S)) == "out of memory"
    running.hosts["prefill"].close()
    running.hosts["prefill"].close()


def test_an_aborted_request_gives_its_blocks_back(running):
    running.submit("r", [5] * 100, SamplingParams(temperature=0.0, seed=0, max_tokens=400, ignore_eos=True))
    running.collect(lambda events: len(of_type(events, TokenOutput)) > 3)
    for host in running.hosts.values():
        host.abort("r")
    running.collect(lambda _: all(load.free_blocks == load.total_blocks for load in running.loads.values()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_model_len": 4096}, "model.max_model_len is 4096, the model has 2048 positions"),
        ({"num_blocks": 10, "max_model_len": 512}, "10 blocks of 16 tokens cannot hold one sequence"),
        ({"kv_cache_bytes": 1}, "decode.kv_cache_gb"),
        ({"dtype": "float64"}, "float64"),
        ({"attention_backend": "NONSENSE"}, "NONSENSE"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(settings, text, tiny_checkpoint):
    config = WorkerConfig("decode-0", "decode", str(tiny_checkpoint("llama")), **settings)
    with pytest.raises(ConfigError, match=text):
        WorkerHost(config, LocalConnector(LocalFabric(), threaded=True), lambda _: None, lambda _: None)


def test_a_missing_checkpoint_is_refused(tmp_path):
    config = WorkerConfig("decode-0", "decode", str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing"):
        WorkerHost(config, LocalConnector(LocalFabric(), threaded=True), lambda _: None, lambda _: None)


def test_the_cache_is_no_larger_than_a_full_batch_can_use(tiny_checkpoint):
    config = WorkerConfig("decode-0", "decode", str(tiny_checkpoint("llama")), max_model_len=256, max_num_seqs=3)
    host = WorkerHost(config, LocalConnector(LocalFabric(), threaded=True), lambda _: None, lambda _: None)
    try:
        assert host.info.num_blocks == 3 * 16
    finally:
        host.close()


def test_loading_progress_is_told(tiny_checkpoint):
    seen: list[tuple[int, int]] = []
    config = WorkerConfig("decode-0", "decode", str(tiny_checkpoint("llama")), max_model_len=64, num_blocks=4)
    host = WorkerHost(
        config,
        LocalConnector(LocalFabric(), threaded=True),
        lambda _: None,
        lambda _: None,
        lambda done, total: seen.append((done, total)),
    )
    host.close()
    assert seen == sorted(seen)
    assert seen[-1][0] > 0
    assert all(done <= total for done, total in seen)
