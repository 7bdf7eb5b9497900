"""A service whose two workers have two ranks each, and its client, for tests on real parts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.client.client import AsyncBatonClient, Connection
from cluster.config.load import load_config
from cluster.launch import Service, launch
from cluster.server.grpc.serve import start_server
from workers.sampling_params import SamplingParams

PATIENCE_S = 120.0


class Running:
    """A service of one pair, a client, and what was said at the start."""

    def __init__(
        self, service: Service, client: AsyncBatonClient, checkpoint: Path, lines: list[str], logs: Path
    ) -> None:
        self.service, self.client, self.checkpoint, self.lines, self.logs = service, client, checkpoint, lines, logs

    async def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        stream = self.client.generate(token_ids=prompt, sampling=sampling)
        return [token async for chunk in stream for token in chunk.token_ids]

    async def kv_bytes(self, prompt: list[int]) -> int:
        """Of KV cache that all ranks of prefill together write for a prompt."""
        stream = self.client.generate(token_ids=prompt, sampling=SamplingParams(max_tokens=2, ignore_eos=True))
        reports = [chunk.report async for chunk in stream if chunk.report is not None]
        return reports[-1].kv_bytes

    async def until(self, condition: Callable[[list], bool]) -> None:
        for _ in range(int(PATIENCE_S / 0.02)):
            if condition(await self.client.workers()):
                return
            await asyncio.sleep(0.02)
        pytest.fail(f"waited in vain: {await self.client.workers()}")

    async def until_idle(self) -> None:
        await self.until(
            lambda workers: all(
                w.state == "ready" and w.load.free_blocks == w.load.total_blocks and not w.load.running for w in workers
            )
        )


@asynccontextmanager
async def serving(checkpoint: Path, logs: Path, max_model_len: int = 1024) -> AsyncIterator[Running]:
    """A pair of workers of two ranks each."""
    overrides = {
        "model.path": str(checkpoint),
        "server.port": 0,
        "prefill.tensor_parallel_size": 2,
        "decode.tensor_parallel_size": 2,
        "prefill.num_cpus": 0.5,
        "decode.num_cpus": 0.5,
        "prefill.num_blocks": 256,
        "decode.num_blocks": 256,
        "prefill.max_num_batched_tokens": 48,
        "model.max_model_len": max_model_len,
        "liveness.start_silence_s": 20,
        "logging.folder": str(logs),
    }
    lines: list[str] = []
    async with launch(load_config(environ={}, overrides=overrides), lines.append) as service:
        config = load_config(environ={}, overrides=overrides).server
        server = await start_server(config, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:
            yield Running(service, client, checkpoint, lines, logs)
        await server.stop()


def prompts(count: int, seed: int, longest: int = 150) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(2, longest))] for _ in range(count)]
