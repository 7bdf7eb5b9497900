"""Every family through the whole service: gRPC, the router, chunks of prompts, handoffs, prefix caches."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.api import RequestReport
from cluster.client.client import AsyncBatonClient, Connection
from cluster.config.load import load_config
from cluster.launch import launch
from cluster.server.grpc.serve import start_server
from long_tails import slow_unless
from tiny_families import FAMILIES
from workers.sampling_params import SamplingParams

NUM_TOKENS = 8
OF_EACH_KIND = ("llama", "gpt_oss", "deepseek_v2")
"""Dense, windows and experts, latents; all others are compared without a service, in `tests/workers`."""


@pytest.mark.parametrize("family", slow_unless(OF_EACH_KIND.__contains__, FAMILIES))
async def test_concurrent_requests_equal_transformers(family, tiny_checkpoint, reference_greedy):
    """Prompts of one token and of several chunks at once; then again, with and without another end, from the caches."""
    checkpoint, rng = tiny_checkpoint(family), random.Random(family)
    overrides = {
        "model.path": str(checkpoint),
        "model.dtype": "float32",
        "model.max_model_len": 256,
        "server.port": 0,
        "handoff.connector": "local",
        "prefill.num_blocks": 64,
        "decode.num_blocks": 64,
        "decode.replicas": 2,
        "prefill.max_num_batched_tokens": 32,
    }
    async with launch(load_config(environ={}, overrides=overrides), lambda line: None) as service:
        config = load_config(environ={}, overrides=overrides)
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:

            async def ask(prompt: list[int]) -> RequestReport:
                sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
                tokens, report = [], None
                async for chunk in client.generate(token_ids=prompt, sampling=sampling):
                    tokens += chunk.token_ids
                    report = chunk.report or report
                assert tokens == reference_greedy(checkpoint, prompt, NUM_TOKENS), len(prompt)
                assert report is not None
                assert report.decode_worker.startswith("decode-")
                assert report.kv_bytes > 0
                return report

            prompts = [[rng.randrange(3, 512) for _ in range(length)] for length in (1, 15, 70, 150)]
            await asyncio.gather(*map(ask, prompts))
            longest = prompts[-1]
            again = await asyncio.gather(*map(ask, (longest + prompts[1], longest[:120] + prompts[2])))
            assert all(report.cached_tokens >= 96 for report in again)
            workers = await client.workers()
            assert all(worker.load.free_blocks == worker.load.total_blocks for worker in workers)
        await server.stop()
