"""A node that is lost without a word, on a real Ray of several nodes: its raylet and its workers are frozen at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from benchmarks.ray_nodes import RayNodes, ray_nodes
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(360)]

HEAD, DOOMED, SPARE = "127.0.0.7", "127.0.0.8", "127.0.0.9"
ROOM = {"prefill": 1.0, "decode": 1.0}
SERVED_S, PATIENCE_S, BREAK_S = 150.0, 90.0, 0.5
MAX_TOKENS = 48


@dataclass
class Load:
    """Clients that ask one question after the other, and what they got."""

    client: AsyncBatonClient
    questions: list[tuple[list[int], list[int]]]
    answered: list[int] = field(default_factory=list)
    failed: list[BatonClientError] = field(default_factory=list)
    retried: int = 0
    enough: bool = False

    async def ask(self, number: int) -> None:
        """One question; the answer must be right, or the failure the one for a lost worker."""
        prompt, expected = self.questions[number % len(self.questions)]
        sampling = SamplingParams(temperature=0.0, max_tokens=len(expected), ignore_eos=True)
        tokens: list[int] = []
        attempts = 0
        try:
            async for chunk in self.client.generate(token_ids=prompt, sampling=sampling, timeout_s=PATIENCE_S):
                tokens += chunk.token_ids
                attempts = chunk.report.attempts if chunk.report is not None else attempts
        except BatonClientError as error:
            self.failed.append(error)
            return
        assert tokens == expected
        self.answered.append(number)
        self.retried += attempts > 1

    async def keep_asking(self, first: int) -> None:
        """With breaks, which leave processors to what starts meanwhile."""
        number = first
        while not self.enough:
            await self.ask(number)
            await asyncio.sleep(BREAK_S)
            number += 1


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Two nodes with room for a worker of each pool."""
    if not sys.platform.startswith("linux"):
        pytest.skip("loopback addresses beyond 127.0.0.1 need Linux")
    with ray_nodes(HEAD, ROOM) as cluster:
        cluster.add("doomed", DOOMED, ROOM)
        yield cluster


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def address(nodes: RayNodes, checkpoint: Path, tmp_path: Path) -> Iterator[str]:
    """Of a service with two workers in each pool; every node holds one of each."""
    command = [str(Path(sys.executable).parent / "baton"), "up", "--address", nodes.address, "--port", "0"]
    command += ["--model", str(checkpoint), "--prefill", "2", "--decode", "2"]
    for pool in ("prefill", "decode"):
        command += ["--set", f"{pool}.resources={pool}=1", "--set", f"{pool}.threads=1"]
        command += ["--set", f"{pool}.num_blocks=256", "--set", f"{pool}.max_num_seqs=4"]
    command += ["--set", "prefill.max_num_batched_tokens=48", "--set", "prefill.enable_prefix_caching=false"]
    log = tmp_path / "service.log"
    with log.open("wb") as out:
        service = subprocess.Popen(
            command,
            env={**os.environ, **nodes.environment, "UCX_NET_DEVICES": "lo"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        give_up_at = time.monotonic() + SERVED_S
        while not (served := re.search(r"serves \S+ on (127\.0\.0\.1:\d+)", log.read_text())):
            assert service.poll() is None, log.read_text()
            assert time.monotonic() < give_up_at, log.read_text()
            time.sleep(0.1)
        yield served[1]
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0, log.read_text()
    finally:
        service.kill()
        service.wait(10)


async def until(what: str, client: AsyncBatonClient, condition: Callable[[list], bool]) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition(workers := await client.workers()):
        assert time.monotonic() < give_up_at, f"waited in vain until {what}: {workers}"
        await asyncio.sleep(0.05)


def ready(workers: list) -> set[str]:
    return {worker.engine_id for worker in workers if worker.state == "ready"}


def decode(workers: list) -> list:
    return [worker for worker in workers if worker.role == "decode"]


async def test_a_node_that_falls_silent_with_requests_on_it(
    nodes: RayNodes, address: str, checkpoint: Path, reference_greedy
) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 512) for _ in range(length)] for length in (30, 90, 160, 240)]
    questions = [(prompt, reference_greedy(checkpoint, prompt, MAX_TOKENS)) for prompt in prompts]
    async with AsyncBatonClient(Connection(address)) as client:
        before = ready(await client.workers())
        assert len(before) == 4
        doomed, surviving = set(nodes.workers("doomed")), set(nodes.workers("head"))
        assert (len(doomed), len(surviving)) == (2, 2)
        await asyncio.to_thread(nodes.add, "spare", SPARE, ROOM)
        load = Load(client, questions)
        clients = [asyncio.ensure_future(load.keep_asking(number)) for number in range(10)]
        await until("both decode workers have requests", client, lambda ws: all(w.load.running for w in decode(ws)))
        frozen = await asyncio.to_thread(nodes.freeze, "doomed")
        await until("the node's workers are lost", client, lambda ws: len(before - ready(ws)) == 2)
        served_without = len(load.answered)
        await until("there are two workers in their place", client, lambda ws: len(ready(ws)) == 4)
        assert len(load.answered) > served_without
        lost = before - ready(await client.workers())
        assert {engine.partition("-")[0] for engine in lost} == {"prefill", "decode"}, "one of each pool was there"
        assert len(nodes.workers("spare")) == 2
        assert set(nodes.workers("head")) == surviving
        nodes.thaw(frozen)
        await until_gone(doomed)
        load.enough = True
        await asyncio.gather(*clients)
        assert all(error.status is grpc.StatusCode.UNAVAILABLE for error in load.failed)
        assert load.retried + len(load.failed) > 0, "the node held some of them"
        assert not lost & {worker.engine_id for worker in await client.workers()}
        await until("no block is left with anybody", client, lambda ws: all(at_rest(w.load) for w in ws))


def at_rest(load) -> bool:
    """Whether every block is free, or was granted to the lost worker, which may write until its lease has run out."""
    return load.free_blocks + load.quarantined_blocks == load.total_blocks


async def until_gone(pids: set[int]) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while left := {pid for pid in pids if alive(pid)}:
        assert time.monotonic() < give_up_at, f"{left} go on"
        await asyncio.sleep(0.1)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return False
