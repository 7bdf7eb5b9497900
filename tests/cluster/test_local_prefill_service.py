"""A whole service over gRPC where prompts may be computed on their decode worker, in one process."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.api import RequestReport, Usage
from cluster.cli.generate import stats
from cluster.client.client import AsyncBatonClient, BatonClient, Connection
from cluster.config.load import load_config
from cluster.launch import launch
from cluster.server.grpc.serve import start_server
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams


def prompts(count: int, longest: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(2, longest))] for _ in range(count)]


async def generate(client: AsyncBatonClient, prompt: list[int], max_tokens: int) -> tuple[list[int], RequestReport]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    tokens: list[int] = []
    report = None
    async for chunk in client.generate(token_ids=prompt, sampling=sampling):
        tokens += chunk.token_ids
        report = chunk.report or report
    assert report is not None
    return tokens, report


def explain(connection: Connection, prompt: list[int]):
    with BatonClient(connection) as client:
        return client.explain(token_ids=prompt)


@pytest.mark.parametrize("disaggregation", ["never", "auto"])
async def test_answers_equal_transformers(disaggregation, tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint("llama")
    overrides = {
        "model.path": str(checkpoint),
        "model.max_model_len": 512,
        "server.port": 0,
        "handoff.connector": "local",
        "router.disaggregation": disaggregation,
        "prefill.replicas": 0 if disaggregation == "never" else 1,
        "decode.max_num_batched_tokens": 32,
    }
    config = load_config(environ={}, overrides=overrides)
    asked = prompts(8, longest=150)
    async with launch(config, lambda line: None) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:
            answers = await asyncio.gather(*(generate(client, prompt, 12) for prompt in asked))
            explanation = await asyncio.to_thread(explain, Connection(server.address), asked[0])
            workers = await client.workers()
        await server.stop()
    for prompt, (tokens, report) in zip(asked, answers, strict=True):
        assert tokens == reference_greedy(checkpoint, prompt, 12)
        assert report.decode_worker.startswith("decode-0.")
        assert report.attempts == 1
        assert bool(report.kv_bytes) == bool(report.prefill_worker)
    ways = {pair.prefill is None for pair in explanation.pairs}
    assert ways == ({True} if disaggregation == "never" else {True, False})
    if disaggregation == "never":
        assert not any(report.prefill_worker for _, report in answers)
        assert [worker.role for worker in workers] == ["decode"]


def test_the_command_line_says_who_computed_the_prompt():
    usage = Usage(10, 4)
    alone = stats(usage, FinishReason.LENGTH, RequestReport("", "decode-0.1", ttft_s=0.1))
    assert "workers decode-0.1 alone, attempts 1" in alone
    assert "handoff" not in alone
    pair = stats(usage, FinishReason.LENGTH, RequestReport("prefill-0.1", "decode-0.1", kv_bytes=2**20))
    assert "workers prefill-0.1 → decode-0.1, attempts 1" in pair
    assert "handoff 1.00 MiB" in pair
