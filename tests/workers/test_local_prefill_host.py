"""A decode worker that computes prompts, built from its configuration: backends, memory, step times, answers."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator

import pytest

from attention.selection.selector import force_attn_backend
from attention.spec import Phase
from cache_groups import group_caches
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from made_requests import worker_request
from workers.config import WorkerConfig
from workers.errors import ConfigError
from workers.messages import DecodeReport, PrefillReport, TokenOutput
from workers.models.loader import load_model
from workers.runner.model_runner import ModelRunner
from workers.runner.profile_run import largest_batches_of
from workers.sampling_params import SamplingParams
from workers.scheduling.local_prefill import warm_up_chunks
from workers.worker_host import WorkerHost

PATIENCE_S = 30.0


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 512) for _ in range(length))


@pytest.fixture
def start(tiny_checkpoint) -> Iterator:
    """`start(**settings)`: a host, and the queue of what it says."""
    hosts: list[WorkerHost] = []

    def make(**settings):
        outputs: queue.SimpleQueue = queue.SimpleQueue()
        given = {
            "num_blocks": 64,
            "max_model_len": 512,
            "max_num_batched_tokens": 32,
            "local_prefill": True,
            **settings,
        }
        config = WorkerConfig("decode-0", "decode", str(tiny_checkpoint("llama")), dtype="float32", **given)
        host = WorkerHost(config, LocalConnector(LocalFabric(), threaded=True), outputs.put, outputs.put)
        hosts.append(host)
        return host, outputs

    yield make
    for host in hosts:
        host.close()


def answer(host: WorkerHost, outputs: queue.SimpleQueue, prompt_token_ids, max_tokens: int) -> list:
    """All that it says of one request, up to its last token."""
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    host.submit(worker_request("r", prompt_token_ids, sampling, timeout_s=PATIENCE_S))
    events: list = []
    while not any(isinstance(event, TokenOutput) and event.finish_reason for event in events):
        events += outputs.get(timeout=PATIENCE_S).events
    return events


def test_it_serves_without_any_peer(start, reference_greedy, tiny_checkpoint):
    host, outputs = start()
    events = answer(host, outputs, prompt(100), 10)
    tokens = [event.token_id for event in events if isinstance(event, TokenOutput)]
    assert tokens == reference_greedy(tiny_checkpoint("llama"), list(prompt(100)), 10)
    (report,) = [event for event in events if isinstance(event, PrefillReport)]
    assert report.num_chunks == 4
    assert sum(isinstance(event, DecodeReport) for event in events) == 1


def test_it_measures_both_of_its_phases(start):
    step_times = start()[0].info.step_times
    assert [tokens for tokens, _ in step_times.prefill] == [32]
    assert [sequences for sequences, _ in step_times.decode] == [1, 4, 16]
    assert start(local_prefill=False)[0].info.step_times.prefill == ()


def test_each_phase_has_the_backend_that_is_chosen_for_it(start):
    assert start()[0].info.attention_backend == "CPU_ATTN"
    assert start(attention_backend="TORCH_SDPA")[0].info.attention_backend == "TORCH_SDPA"
    with force_attn_backend("TORCH_SDPA", Phase.PREFILL):
        host, outputs = start()
        assert host.info.attention_backend == "CPU_ATTN, prefill TORCH_SDPA"
        assert len(answer(host, outputs, prompt(40), 3)) == 5
        assert start(local_prefill=False)[0].info.attention_backend == "CPU_ATTN"


def test_a_backend_that_cannot_prefill_is_refused_with_the_reason(tiny_checkpoint):
    with pytest.raises(ConfigError, match="attention backend FLASHMLA cannot run this model"):
        load_model(tiny_checkpoint("llama"), phase=Phase.DECODE, local_prefill=True, backend_name="FLASHMLA")


def test_memory_is_planned_for_the_largest_chunk_and_the_largest_step(tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), dtype="float32", phase=Phase.DECODE, local_prefill=True)
    batches: list[int] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: batches.append(output.shape[0]))
    config = WorkerConfig("d", "decode", "m", max_num_batched_tokens=64, max_num_seqs=5, local_prefill=True)
    largest_batches_of(model, config, 256)()
    hook.remove()
    assert batches == [64, 5]


@pytest.mark.parametrize(("max_model_len", "chunks"), [(512, [(16, 2), (16, 32)]), (20, [(16, 2), (16, 4)]), (16, [])])
def test_chunks_behind_a_prefix_are_warm_before_anybody_waits_for_them(max_model_len, chunks, tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), dtype="float32")
    runner = ModelRunner(model, group_caches(model, 8))
    batches: list = []
    hook = model.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[3]))
    warm_up_chunks(runner, 32, max_model_len)
    hook.remove()
    assert [(batch.context_lens[0] - batch.query_lens[0], batch.query_lens[0]) for batch in batches] == chunks
