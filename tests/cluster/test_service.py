"""The whole service on real parts: gRPC, Ray actors in processes of their own, NIXL between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cluster.api import RequestReport
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.launch import Service, launch
from cluster.server.grpc.serve import start_server
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

PATIENCE_S = 120.0


@dataclass
class Running:
    service: Service
    client: AsyncBatonClient
    checkpoint: Path

    async def generate(self, prompt: list[int], max_tokens: int, **kwargs) -> tuple[list[int], RequestReport]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        tokens: list[int] = []
        report = None
        async for chunk in self.client.generate(token_ids=prompt, sampling=sampling, **kwargs):
            tokens += chunk.token_ids
            report = chunk.report or report
        assert report is not None
        return tokens, report

    async def until(self, what: str, condition: Callable[[list], bool]) -> None:
        for _ in range(int(PATIENCE_S / 0.1)):
            if condition(await self.client.workers()):
                return
            await asyncio.sleep(0.1)
        pytest.fail(f"waited in vain until {what}: {await self.client.workers()}")

    async def until_idle(self) -> None:
        await self.until(
            "every block is free and every worker ready",
            lambda workers: all(w.state == "ready" and w.load.free_blocks == w.load.total_blocks for w in workers),
        )

    def pid(self, engine_id: str) -> int:
        replica = self.service.engine.pools.find(engine_id)
        assert replica is not None
        assert replica.info is not None
        assert replica.info.pid != os.getpid()
        return replica.info.pid


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tiny_checkpoint) -> AsyncIterator[Running]:
    """Two prefill and two decode workers, small chunks, so that a handoff has many parts."""
    checkpoint = tiny_checkpoint("llama")
    overrides = {
        "model.path": str(checkpoint),
        "server.port": 0,
        "prefill.replicas": 2,
        "decode.replicas": 2,
        "prefill.num_blocks": 256,
        "decode.num_blocks": 256,
        "decode.drain_timeout_s": 0.5,
        "prefill.max_num_batched_tokens": 48,
    }
    config = load_config(environ={}, overrides=overrides)
    async with launch(config, lambda line: None) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:
            yield Running(service, client, checkpoint)
        await server.stop()


def prompts(count: int, seed: int, longest: int = 150) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(2, longest))] for _ in range(count)]


async def test_concurrent_requests_equal_transformers(running, reference_greedy):
    pool = prompts(16, seed=1)
    answers = await asyncio.gather(*(running.generate(prompt, 20) for prompt in pool))
    for prompt, (tokens, report) in zip(pool, answers, strict=True):
        assert tokens == reference_greedy(running.checkpoint, prompt, 20)
        assert report.prefill_worker.startswith("prefill-")
        assert report.decode_worker.startswith("decode-")
        assert report.kv_bytes == -(-len(prompt) // 16) * 3 * 2 * 16 * 2 * 16 * 4
        assert report.attempts == 1
        assert 0 < report.prefill_s < report.ttft_s
        assert 0 <= report.hidden_fraction <= 1
    assert {report.prefill_worker for _, report in answers} == {
        w.engine_id for w in await running.client.workers() if w.role == "prefill"
    }, "the router uses the whole pool"
    await running.until_idle()


async def test_one_token_needs_no_decode_worker(running, reference_greedy):
    prompt = prompts(1, seed=2)[0]
    tokens, report = await running.generate(prompt, 1)
    assert tokens == reference_greedy(running.checkpoint, prompt, 1)
    assert report.decode_worker == ""
    assert report.kv_bytes == 0


async def test_text_in_text_out_with_logprobs(running):
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)
    chunks = [chunk async for chunk in running.client.generate("the quick brown fox", sampling=sampling)]
    positions = [position for chunk in chunks for position in chunk.logprobs]
    assert len(positions) == 12
    for position in positions:
        assert position.chosen.token_id == position.top[0].token_id
        assert len(position.top) == 3
    assert "".join(chunk.text for chunk in chunks)


async def test_cancelling_frees_both_sides(running):
    for seed in range(6):
        stream = running.client.generate(
            token_ids=prompts(1, seed)[0], sampling=SamplingParams(max_tokens=1500, ignore_eos=True)
        )
        if seed % 2:
            for _ in range(seed):
                await anext(stream)
            await stream.aclose()
        else:
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.002 * seed)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            await stream.aclose()
    await running.until_idle()


async def test_the_deadline_governs_and_frees_both_sides(running):
    with pytest.raises(BatonClientError) as error:
        await running.generate(prompts(1, 4)[0], 1800, timeout_s=0.4)
    assert error.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
    await running.until_idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_killed_worker(role, running, reference_greedy):
    """Its requests go on elsewhere or end with UNAVAILABLE, the others go on, the blocks and the worker return."""
    await running.until_idle()
    before = {w.engine_id for w in await running.client.workers() if w.role == role}
    victim = sorted(before)[0]
    pool = prompts(24, seed=5, longest=400)
    expected = [reference_greedy(running.checkpoint, prompt, 30) for prompt in pool]
    tasks = [asyncio.ensure_future(running.generate(prompt, 30)) for prompt in pool]
    while not any(w.engine_id == victim and w.load.running for w in running.service.engine.workers()):
        assert not all(task.done() for task in tasks), "the victim never got anything to do"
        await asyncio.sleep(0)
    os.kill(running.pid(victim), signal.SIGKILL)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    served = retried = failed = 0
    for result, tokens in zip(results, expected, strict=True):
        if isinstance(result, BatonClientError):
            assert result.status is grpc.StatusCode.UNAVAILABLE
            failed += 1
        else:
            assert not isinstance(result, BaseException), result
            assert result[0] == tokens
            served += 1
            retried += result[1].attempts > 1
    assert served >= len(pool) // 4, "the other worker went on"
    assert retried + failed > 0, "the victim held some of them"
    await running.until_idle()
    after = {w.engine_id for w in await running.client.workers() if w.role == role}
    assert len(after) == len(before)
    assert victim not in after
    tokens, _ = await running.generate(pool[0], 30)
    assert tokens == expected[0]


async def test_every_answer_has_the_report_of_its_handoff(running, monkeypatch):
    """Also short ones, whose last token may overtake the prefill worker's report, on a busy machine by much."""
    for module in ("cluster.gateway.attempts", "cluster.gateway.request"):
        monkeypatch.setattr(f"{module}.REPORT_PATIENCE_S", PATIENCE_S)
    pool = prompts(40, seed=6, longest=30)
    answers = await asyncio.gather(*(running.generate(prompt, 2) for prompt in pool))
    assert all(report.kv_bytes > 0 for _, report in answers)


async def test_pools_shrink_and_grow_while_they_serve(running, reference_greedy):
    pool = prompts(24, seed=9)
    loads = [asyncio.ensure_future(running.generate(prompt, 60)) for prompt in pool]

    async def has(prefill: int, decode: int) -> None:
        await running.until(
            f"{prefill} prefill and {decode} decode workers are ready",
            lambda workers: (
                sorted((w.role, w.state) for w in workers)
                == [("decode", "ready")] * decode + [("prefill", "ready")] * prefill
            ),
        )

    before = {worker.engine_id for worker in await running.client.workers()}
    targets = await running.client.scale({"prefill": 1, "decode": 1})
    assert [(target.role, target.target) for target in targets] == [("prefill", 1), ("decode", 1)]
    await has(1, 1)
    loads += [asyncio.ensure_future(running.generate(prompt, 60)) for prompt in pool]
    await running.client.scale({"prefill": 2, "decode": 2})
    await has(2, 2)
    for prompt, (tokens, report) in zip(pool * 2, await asyncio.gather(*loads), strict=True):
        assert tokens == reference_greedy(running.checkpoint, prompt, 60)
        assert report.attempts == 1
    assert len(before - {worker.engine_id for worker in await running.client.workers()}) == 2
    await running.until_idle()
