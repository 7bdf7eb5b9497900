"""`baton up` with real workers, told to stop while it answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import grpc
import pytest

from baton_up import address_of, start_up
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(360)]

ROOT = Path(__file__).parents[2]
NUM_STREAMS, NUM_TOKENS = 24, 100


async def test_no_stream_fails_when_the_service_is_told_to_stop(tiny_checkpoint) -> None:
    process = start_up(tiny_checkpoint("llama"), "server.drain_timeout_s=120")
    try:
        address = await address_of(process)
        async with AsyncBatonClient(Connection(address)) as client:
            begun = asyncio.Semaphore(0)

            async def generate(seed: int, num_tokens: int) -> int:
                sampling, count = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed), 0
                async for chunk in client.generate(token_ids=[3 + seed, 4, 5], sampling=sampling):
                    if not count:
                        begun.release()
                    count += len(chunk.token_ids)
                return count

            streams = [asyncio.create_task(generate(seed, NUM_TOKENS)) for seed in range(NUM_STREAMS)]
            for _ in streams:
                await begun.acquire()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.gather(*streams) == [NUM_TOKENS] * NUM_STREAMS
            with pytest.raises(BatonClientError) as refusal:
                await generate(0, 1)
            # gRPC drops a call that comes in the moment in which it closes, before any code of the server sees it.
            assert refusal.value.status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        _, err = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0
        assert "Draining" in err
        assert "Traceback" not in err
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()
