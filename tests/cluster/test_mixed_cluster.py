"""Unlike workers in one service, under load, on real parts: gRPC, Ray actors, each a process, NIXL between them.

Each pool has two groups of different attention backends and block sizes, so that only workers of like groups can work
together. Clients ask without a pause while groups grow and shrink and workers are killed, and every token is held
against what transformers generates.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from cluster.api import RequestReport, WorkerStatus
from cluster.cli.main import main
from cluster.client.client import AsyncBatonClient, Connection
from cluster.config.load import load_config
from cluster.launch import Service, launch
from cluster.recall import SHIPPED_MODEL, recall_prompt
from cluster.server.grpc.serve import start_server
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(360), pytest.mark.asyncio(loop_scope="module")]

PATIENCE_S = 120.0
NUM_TOKENS = 40
NUM_CLIENTS = 5
PROMPTS = [recall_prompt(random.Random(entries), entries) for entries in (4, 8, 16, 24, 32, 48, 64)]
SMALL = {"attention_backend": "CPU_ATTN", "block_size": 16}
LARGE = {"attention_backend": "TORCH_SDPA", "block_size": 32}
WORKERS = ("prefill-small-0", "prefill-large-0", "decode-small-0", "decode-large-0")


def name_of(engine_id: str) -> str:
    return engine_id.partition(".")[0]


def group_of(engine_id: str) -> str:
    return name_of(engine_id).split("-")[1]


@dataclass
class Mixed:
    """The service, a client, and the right answers."""

    service: Service
    address: str
    client: AsyncBatonClient
    answers: list[list[int]]

    async def ask(self, number: int) -> RequestReport:
        """Ask one of the questions, and check every token of the answer."""
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        tokens: list[int] = []
        report = None
        async for chunk in self.client.generate(PROMPTS[number].text, sampling=sampling, timeout_s=2 * PATIENCE_S):
            tokens += chunk.token_ids
            report = chunk.report or report
        assert tokens == self.answers[number]
        assert report is not None
        return report

    async def until(self, what: str, condition: Callable[[list[WorkerStatus]], bool]) -> None:
        for _ in range(int(PATIENCE_S / 0.005)):
            if condition(self.service.engine.workers()):
                return
            await asyncio.sleep(0.005)
        pytest.fail(f"waited in vain until {what}: {self.service.engine.workers()}")

    async def until_ready(self, *names: str) -> None:
        await self.until(
            f"{names} are ready, and nobody else is there",
            lambda workers: (
                sorted((name_of(w.engine_id), w.state) for w in workers) == sorted((n, "ready") for n in names)
            ),
        )

    async def until_idle(self) -> None:
        await self.until(
            "every block is free",
            lambda workers: all(
                w.state == "ready" and w.load.free_blocks == w.load.total_blocks and not w.load.quarantined_blocks
                for w in workers
            ),
        )

    async def until_busy(self, name: str) -> WorkerStatus:
        """That worker, at a moment when it has work."""
        found: list[WorkerStatus] = []

        def busy(workers: list[WorkerStatus]) -> bool:
            found[:] = [
                w for w in workers if name_of(w.engine_id) == name and (w.load.running or w.load.waiting_tokens)
            ]
            return bool(found)

        await self.until(f"{name} has work", busy)
        return found[0]

    def kill(self, engine_id: str) -> None:
        replica = self.service.engine.pools.find(engine_id)
        assert replica is not None
        assert replica.info is not None
        assert replica.info.pid != os.getpid()
        os.kill(replica.info.pid, signal.SIGKILL)


@dataclass
class Load:
    """What the clients have got."""

    reports: list[RequestReport] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    enough: bool = False

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """The groups that have worked together."""
        return {(group_of(report.prefill_worker), group_of(report.decode_worker)) for report in self.reports}

    async def more(self, number: int = 10) -> None:
        """Until so many further answers have come."""
        wanted = len(self.reports) + number
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.reports) >= wanted)


@contextlib.asynccontextmanager
async def under_load(mixed: Mixed) -> AsyncIterator[Load]:
    """Clients that ask one question after the other; every answer of theirs must have been right."""
    load = Load()

    async def client(turn: int) -> None:
        while not load.enough:
            report = await mixed.ask(turn % len(PROMPTS))
            turn += NUM_CLIENTS
            async with load.arrived:
                load.reports.append(report)
                load.arrived.notify_all()

    async with asyncio.timeout(2 * PATIENCE_S), asyncio.TaskGroup() as clients:
        for number in range(NUM_CLIENTS):
            clients.create_task(client(number))
        yield load
        load.enough = True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mixed(reference_greedy) -> AsyncIterator[Mixed]:
    groups = {name: {**own, "max_replicas": 2} for name, own in (("small", SMALL), ("large", LARGE))}
    settings = {"num_blocks": 256, "drain_timeout_s": 2.0, "groups": groups}
    overrides = {f"{role}.{name}": value for role in ("prefill", "decode") for name, value in settings.items()}
    # No group can serve all clients alone, however fast it is, and each prompt keeps a prefill worker busy for a while.
    overrides |= {
        "decode.max_num_seqs": 2,
        "prefill.max_num_batched_tokens": 32,
        "prefill.enable_prefix_caching": False,
    }
    overrides |= {"server.port": 0, "server.max_queue_wait_s": 2 * PATIENCE_S}
    config = load_config(environ={}, overrides=overrides)
    async with launch(config, lambda line: None) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:
            answers = []
            for prompt in PROMPTS:
                token_ids = await service.generation.tokenize(prompt.text, "")
                answers.append(await asyncio.to_thread(reference_greedy, SHIPPED_MODEL, token_ids, NUM_TOKENS))
            yield Mixed(service, server.address, client, answers)
        await server.stop()


async def test_like_workers_serve_together_and_explain_says_why_others_do_not(mixed, monkeypatch, capsys):
    workers = {name_of(w.engine_id): w for w in await mixed.client.workers()}
    assert tuple(workers) == WORKERS
    for name, worker in workers.items():
        own = SMALL if group_of(name) == "small" else LARGE
        assert (worker.group, worker.attention_backend, worker.block_size) == (group_of(name), *own.values())
    monkeypatch.setenv("COLUMNS", "400")
    asked = ["explain", PROMPTS[0].text, "--max-tokens", "8", "--server", mixed.address]
    assert await asyncio.to_thread(main, asked) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "prefill-" in line]
    unlike = [line for line in lines if ("prefill-small-0" in line) != ("decode-small-0" in line)]
    assert len(lines) == 4
    assert len(unlike) == 2
    assert all("block_size is" in line and "→" not in line for line in unlike)
    assert not any("block_size" in line for line in lines if line not in unlike)
    async with under_load(mixed) as load:
        await load.more(2 * len(PROMPTS))
    assert load.pairs == {("small", "small"), ("large", "large")}
    assert all(report.kv_bytes > 0 and report.attempts == 1 for report in load.reports)
    await mixed.until_idle()


@pytest.mark.slow
async def test_groups_grow_and_shrink_under_load(mixed):
    async with under_load(mixed) as load:
        targets = await mixed.client.scale({"prefill.small": 2, "decode.large": 2})
        assert [(t.role, t.group, t.target, t.max_replicas) for t in targets] == [
            ("prefill", "small", 2, 2),
            ("prefill", "large", 1, 2),
            ("decode", "small", 1, 2),
            ("decode", "large", 2, 2),
        ]
        await mixed.until_ready(*WORKERS, "prefill-small-1", "decode-large-1")
        await load.more()
        await mixed.client.scale({"prefill.small": 1, "decode.large": 1})
        await mixed.until(
            "each group has one worker",
            lambda workers: (
                sorted((w.role, w.group, w.state) for w in workers)
                == sorted((role, group, "ready") for role in ("prefill", "decode") for group in ("small", "large"))
            ),
        )
        await load.more()
    assert load.pairs == {("small", "small"), ("large", "large")}
    assert all(report.attempts == 1 for report in load.reports), "no request fails because of scaling"
    await mixed.until_idle()


@pytest.mark.slow
async def test_killed_workers_are_replaced_and_nothing_is_lost(mixed):
    """For a moment no pair is left that fits: the requests wait until there is one."""
    before = {w.engine_id for w in await mixed.client.workers()}
    async with under_load(mixed) as load:
        victims = []
        for role, group in (("decode", "large"), ("prefill", "small")):
            name = next(name_of(engine_id) for engine_id in before if name_of(engine_id).startswith(f"{role}-{group}"))
            victims.append((await mixed.until_busy(name)).engine_id)
            mixed.kill(victims[-1])
        await mixed.until(
            "both are replaced",
            lambda workers: all(w.state == "ready" and w.engine_id not in victims for w in workers),
        )
        await load.more()
    after = {w.engine_id for w in await mixed.client.workers()}
    assert after & before == before - set(victims)
    assert sorted(map(name_of, after)) == sorted(map(name_of, before))
    assert any(report.attempts > 1 for report in load.reports), "the victims had some of the requests"
    assert load.pairs <= {("small", "small"), ("large", "large")}
    await mixed.until_idle()
