"""Every metric moves by what it is about, and is in docs/metrics.md as it is published."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import QueueFullError
from cluster.gateway.engine import ServingEngine
from cluster.inprocess_worker import InProcessWorker
from cluster.metrics.catalog import CATALOG, token_buckets
from cluster.metrics.event_loop import watch_event_loop
from cluster.metrics.reasons import failure_reason
from cluster.metrics.registry import MetricsRegistry
from cluster.metrics.service import observe_service
from cluster.pools.groups import PoolLimits
from fleet import prompt, tokens_of
from workers.errors import CapacityError, HandoffError
from workers.messages import RequestPreempted, TokenOutput

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


class Scrape:
    """What a scrape says: sums of samples by name and by labels."""

    def __init__(self, registry) -> None:
        self.content_type, text = registry.exposition()
        self.families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in self.samples
            if sample.name.partition(":")[2] == name and labels.items() <= sample.labels.items()
        )


@pytest.fixture
async def counted(make_fleet):
    async def make(*args, **kwargs):
        fleet = await make_fleet(*args, **kwargs)
        registry = observe_service(fleet.engine, "tiny", 512, "baton")
        return fleet, registry

    return make


@pytest.fixture
async def idle_engine() -> ServingEngine:
    return ServingEngine([], [], max_queue=0)


async def test_what_a_request_was_is_counted(counted):
    fleet, registry = await counted(1, 1)
    before = Scrape(registry)
    assert not any(before(metric.published_name) for metric in CATALOG if metric.name in ("handoffs", "prompt_tokens"))
    for _ in range(2):  # the second finds the first one's blocks, on both sides
        stream = fleet.start(prompt(100), 8)
        assert len([token async for token in tokens_of(stream)]) == 8
        await fleet.until_idle()
    report = await stream.report()
    after = Scrape(registry)
    assert after("request_success_total", finished_reason="length", engine="0", model_name="tiny") == 2
    assert after("attempts_total", outcome="finished") == 2
    assert (after("prompt_tokens_total"), after("generation_tokens_total")) == (200, 16)
    assert after("prompt_tokens_cached_total") == after("prefix_cache_hits_total") == report.cached_tokens == 96
    assert after("prefix_cache_queries_total") == 200
    assert after("decode_cached_tokens_total") == report.decode_cached_tokens == 96
    for name in (
        "time_to_first_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens", "prefill_seconds",
        "request_params_max_tokens", "request_attempts", "gateway_queue_seconds", "prefill_queue_seconds",
        "prefill_chunks", "first_decode_seconds", "kv_transfer_seconds", "kv_transfer_exposed_seconds",
        "kv_transfer_hidden_ratio", "router_decision_seconds",
    ):  # fmt: skip
        assert after(f"{name}_count") == 2, name
        assert after(f"{name}_bucket", le="+Inf") == 2, name
    gaps = after("inter_token_latency_seconds_count")
    assert 12 <= gaps <= 14, "a token that overtakes the first one comes together with it"
    assert after("inter_token_latency_seconds_bucket", le="+Inf") == gaps
    assert after("request_prompt_tokens_sum") == 200
    assert after("request_prompt_tokens_bucket", le="50.0") == 0
    assert after("request_prompt_tokens_bucket", le="100.0") == 2
    assert after("time_to_first_token_seconds_sum") >= after("prefill_seconds_sum") > 0
    assert after("handoffs_total", outcome="completed", reason="whole") == 2
    pair = {"prefill": "prefill-0", "decode": "decode-0"}
    assert after("kv_transfer_bytes_total", **pair) == (7 + 1) * 3 * 2 * 16 * 2 * 16 * 4, "7 blocks, then the last one"
    assert after("kv_transfer_busy_seconds_total", **pair) > 0
    assert after("kv_transfer_writes_total", **pair) > 0
    assert after("router_decisions_total", decision="pair", reason="predicted_time") == 1
    assert after("router_decisions_total", decision="pair", reason="prefix_cache") == 1
    assert after("gateway_cpu_seconds_total") > before("gateway_cpu_seconds_total")


async def test_what_workers_do_is_read_when_it_is_asked_for(counted):
    fleet, registry = await counted(1, 1, max_num_seqs=1)
    running = fleet.start(prompt(40), 300)
    await anext(running)
    waiting = asyncio.create_task(fleet.run(prompt(20, seed=1), 2))
    await fleet.until(lambda workers: fleet.engine.num_queued == 1 and workers[1].load.running == 1)
    now = Scrape(registry)
    assert now("num_requests_running", engine="decode-0", role="decode") == 1
    assert now("num_requests_waiting", engine="0", role="gateway") == 1
    assert 0 < now("kv_cache_usage_perc", engine="decode-0") < 1
    assert now("kv_blocks", engine="decode-0") == 64
    assert now("kv_blocks_free", engine="decode-0") < 64
    assert now("attempts_running") == 1
    assert now("router_decisions_total", decision="none", reason="no_room") > 0
    assert now("link_bandwidth_bytes_per_second", prefill="prefill-0", decode="decode-0") > 0
    assert now("link_write_seconds", prefill="prefill-0", decode="decode-0") > 0
    assert now("workers", role="decode", state="ready") == now("workers_target", role="decode") == 1
    assert now("worker_heartbeats_total", engine="prefill-0") > 0
    assert 0 <= now("worker_silence_seconds", engine="prefill-0") < 60
    await running.aclose()
    await waiting
    end = Scrape(registry)
    assert end("request_success_total", finished_reason="abort") == end("attempts_total", outcome="cancelled") == 1


async def test_a_loss_an_attempt_that_failed_and_a_migration_are_counted_with_their_reasons(counted):
    fleet, registry = await counted(2, 1)
    fleet.crash_one_on_submit("prefill-0", "prefill-1")
    await fleet.run(prompt(20), 6)
    now = Scrape(registry)
    failed = now("attempts_total", outcome="failed")
    assert failed >= 1
    assert now("migrations_total", reason="worker_lost") == now("handoffs_total", outcome="failed") == failed
    assert now("worker_losses_total", role="prefill") == failed
    assert now("request_attempts_sum") == failed + 1
    assert now("time_to_first_token_seconds_count") == 1


@pytest.mark.usefixtures("like_workers")
async def test_who_drains_is_no_loss_and_its_requests_migrate(counted):
    fleet, registry = await counted(1, 2, max_num_seqs=2, limits={"decode": PoolLimits(drain_timeout_s=0.0)})
    streams = [fleet.start(prompt(20, seed=i), 300) for i in range(2)]
    for stream in streams:
        await anext(stream)
    fleet.engine.scale({"decode": 1})
    for stream in streams:
        _ = [token async for token in tokens_of(stream)]
    now = Scrape(registry)
    assert now("migrations_total", reason="worker_left") == now("attempts_total", outcome="migrated") == 1
    assert now("worker_losses_total") == 0
    assert now("workers_target", role="decode") == 1
    assert now("time_to_first_token_seconds_count") == 2
    assert now("request_generation_tokens_sum") == now("generation_tokens_total") == 600


async def test_what_is_refused_or_fails_is_counted_by_its_error(counted):
    fleet, registry = await counted(1, [{"max_num_seqs": 1}], max_queue=0)
    running = fleet.start(prompt(20), 300)
    await anext(running)
    with pytest.raises(QueueFullError):
        await fleet.run(prompt(20), 4)
    await running.aclose()
    await fleet.until_idle()
    with pytest.raises(CapacityError):
        await fleet.run([5] * 600, 4)
    now = Scrape(registry)
    assert now("requests_refused_total", error="QueueFull") == now("requests_refused_total") == 1
    assert now("request_failures_total", error="Capacity") == 1
    assert now("router_decisions_total", decision="none", reason="impossible") == 1
    assert now("request_success_total", finished_reason="error") == 2


class MakesRoom(InProcessWorker):
    """Says with every token that the sequence has made room for others."""

    async def outputs(self):
        async for batch in super().outputs():
            yield [replace(output, events=tuple(self._with_preemptions(output.events))) for output in batch]

    def _with_preemptions(self, events):
        for event in events:
            yield event
            if isinstance(event, TokenOutput):
                yield RequestPreempted(event.request_id, attempt_id=event.attempt_id)


async def test_prompts_computed_where_they_are_decoded_and_preemptions_are_counted(counted):
    fleet, registry = await counted(1, 1, disaggregation="never", worker_class=MakesRoom)
    await fleet.run(prompt(20), 4)
    now = Scrape(registry)
    assert now("local_prefills_total") == now("router_decisions_total", decision="decode_alone") == 1
    assert now("handoffs_total") == 0
    assert now("num_preemptions_total") == 3, "the last one comes when the request is over"


@pytest.mark.parametrize(
    ("lost", "waits", "held"),
    [("prefill-0", "decode-0", "kv_blocks_granted"), ("decode-0", "prefill-0", "kv_blocks_pinned")],
)
async def test_blocks_that_a_handoff_holds_on_either_side_are_seen(counted, lost, waits, held):
    fleet, registry = await counted(1, 1)
    fleet.handle(lost).submit = lambda request: None  # its peer waits for it
    running = asyncio.create_task(fleet.run(prompt(40), 4))
    await fleet.until(lambda workers: any(worker.load.reserved_blocks for worker in workers))
    now = Scrape(registry)
    assert now(held, engine=waits) == now(held) == 3
    assert now("waiting_prompt_tokens", engine="decode-0") == (40 if waits == "decode-0" else 0)
    running.cancel()
    await asyncio.wait([running])
    await fleet.until_idle()
    end = Scrape(registry)
    assert end(held) == end("waiting_prompt_tokens") == 0


class SaysSo(InProcessWorker):
    """Says that blocks are quarantined and sequences in host memory."""

    async def outputs(self):
        async for batch in super().outputs():
            yield [replace(each, load=replace(each.load, quarantined_blocks=3, preempted=2)) for each in batch]


async def test_blocks_out_of_use_and_sequences_in_host_memory_are_seen(counted):
    fleet, registry = await counted(1, 1, worker_class=SaysSo)
    await fleet.run(prompt(20), 2)
    now = Scrape(registry)
    for engine in ("prefill-0", "decode-0"):
        assert now("kv_blocks_quarantined", engine=engine) == 3
        assert now("sequences_swapped", engine=engine) == 2


def test_every_metric_is_one_that_a_test_here_has_moved():
    here = Path(__file__).read_text()
    assert [metric.published_name for metric in CATALOG if f'"{metric.published_name}' not in here] == []


async def test_a_loop_that_was_held_up_is_seen():
    registry = MetricsRegistry("tiny", 512)
    watching = asyncio.create_task(watch_event_loop(registry))
    await asyncio.sleep(0.02)
    time.sleep(0.3)  # noqa: ASYNC251 - what a loop must not do
    await asyncio.sleep(0.02)
    watching.cancel()
    now = Scrape(registry)
    assert now("event_loop_lag_seconds_count") - now("event_loop_lag_seconds_bucket", le="0.1") >= 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the KV cache was not handed over within 30 s", "timeout"),
        ("prefill worker prefill-0.1 is gone", "peer_lost"),
        ("the connection to decode worker decode-0.1 is made anew", "reconnected"),
        ("a transfer to decode-0.1 failed", "transfer_failed"),
        ("the decode worker granted 3 blocks, 4 are needed", "wrong_grant"),
        ("anything else", "peer_error"),
    ],
)
def test_a_failed_handoff_has_one_of_few_reasons(text, reason):
    assert failure_reason(HandoffError(text)) == reason


async def test_the_page_has_a_row_for_every_metric_as_it_is_published(idle_engine):
    registry = observe_service(idle_engine, "tiny", 512, "baton")
    task = asyncio.create_task(watch_event_loop(registry))
    await asyncio.sleep(0)
    task.cancel()
    families = {family.name.partition(":")[2]: family for family in registry.families()}
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `([\w]+)` \| (\w+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$",
                                                   PAGE.read_text(), re.M)}  # fmt: skip
    assert rows.keys() == {metric.published_name for metric in CATALOG}
    assert families.keys() == {metric.name for metric in CATALOG}
    for metric in CATALOG:
        kind, labels, meaning, vllm = rows[metric.published_name]
        family = families[metric.name]
        assert (kind, family.type, family.documentation) == (metric.kind, metric.kind, metric.help)
        assert re.findall(r"`(\w+)`", labels) == list(metric.labels), metric.name
        assert meaning == metric.help
        assert vllm.strip("` ") == (f"vllm:{metric.published_name}" if metric.vllm else "")


async def test_names_may_be_those_of_vllm_where_the_meaning_is(idle_engine):
    registry = observe_service(idle_engine, "tiny", 512, "vllm")
    names = {family.name for family in registry.families()}
    assert {"vllm:time_to_first_token_seconds", "vllm:kv_cache_usage_perc", "baton:kv_transfer_seconds"} <= names


def test_buckets_of_tokens_end_at_the_context_window():
    assert token_buckets(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)
