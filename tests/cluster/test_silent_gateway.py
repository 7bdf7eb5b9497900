"""A gateway that is frozen for longer than its workers' leases, and goes on: it finds them as they were."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from baton_up import address_of, start_up
from cluster.client.client import AsyncBatonClient, Connection
from kv_transfer.lease import LEASE_S
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.slow, pytest.mark.timeout(360)]

ROOT = Path(__file__).parents[2]


async def test_workers_outlive_a_gateway_that_is_silent(tiny_checkpoint) -> None:
    process = start_up(tiny_checkpoint("llama"))
    try:
        address = await address_of(process)
        async with AsyncBatonClient(Connection(address)) as client:

            async def answer() -> tuple[int, ...]:
                sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
                chunks = [chunk async for chunk in client.generate(token_ids=[3, 4, 5], sampling=sampling)]
                assert chunks[-1].report.kv_bytes > 0, "it was handed over"
                return tuple(token for chunk in chunks for token in chunk.token_ids)

            async def engines() -> set[tuple[str, str]]:
                return {(worker.engine_id, worker.state) for worker in await client.workers()}

            expected, before = await answer(), await engines()
            os.kill(process.pid, signal.SIGSTOP)
            await asyncio.sleep(LEASE_S + 5.0)
            os.kill(process.pid, signal.SIGCONT)
            assert await answer() == expected
            await asyncio.sleep(LEASE_S + 2.0)  # and from then on they are renewed as ever
            assert await answer() == expected
            assert await engines() == before
        process.send_signal(signal.SIGTERM)
        _, err = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0
        assert "lost" not in err
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()
