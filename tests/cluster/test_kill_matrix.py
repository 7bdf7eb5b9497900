"""Parts of a real service killed, frozen, cut off or hung amid a handoff, under clients that know the right answers.

`python -m benchmarks.kill_matrix` runs all cells; here are a few of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from benchmarks.faults.cells import ADDRESSES, TARGETS, Cell, all_cells
from benchmarks.faults.clients import Clients, questions
from benchmarks.faults.stage import stage
from benchmarks.kill_matrix import is_well, run_part
from cluster.client.client import AsyncBatonClient, Connection

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(900)]

PATIENCE_S = 90.0


async def check(cells: list[Cell]) -> None:
    async for result in run_part(cells, num_questions=6):
        assert is_well(result), result
        assert result["right"] >= 16


@pytest.mark.slow
async def test_workers_cut_off_amid_a_handoff() -> None:
    await check([Cell("both", "reset", "while", "new")])


@pytest.mark.slow
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("target", TARGETS)
async def test_whoever_is_hurt_amid_a_handoff(target: str, address: str) -> None:
    cells = [cell for cell in all_cells() if (cell.target, cell.address, cell.phase) == (target, address, "while")]
    await check([cell for cell in cells if not cell.not_run])


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "role"), [("while", "prefill"), ("after", "decode")])
async def test_a_worker_whose_step_hangs_is_noticed_and_replaced(phase: str, role: str, tmp_path: Path) -> None:
    """Its process lives and lets itself be heard: the gate holds the thread that steps, and nobody opens it."""
    async with stage("both", "new", tmp_path, {"liveness.step_timeout_s": 8}) as made:
        async with AsyncBatonClient(Connection(made.address)) as client:
            asked = await questions(client, 12)
        clients = Clients(made.address, asked)
        before = {worker["id"] for worker in await made.workers()}
        states: set[str] = set()
        async with clients.asking():
            made.gate.arm(phase)
            await until(lambda: said(made.gate.reached() is not None))
            hung = (made.gate.reached() or {})[role]

            async def is_replaced() -> bool:
                now = {worker["id"]: worker["state"] for worker in await made.workers()}
                states.add(now.get(hung, "gone"))
                return hung not in now and set(now.values()) == {"ready"}

            await until(is_replaced)
            right = clients.tally.right
            await until(lambda: said(clients.tally.right >= right + 16))
        assert "stalled" in states, "it got nothing new before it was given up"
        assert before - {worker["id"] for worker in await made.workers()} == {hung}, "nobody else was"
        assert not clients.tally.wrong
        assert not clients.tally.failed

        async def all_blocks_are_free() -> bool:
            return all(w["load"]["free_blocks"] == w["load"]["total_blocks"] for w in await made.workers())

        await until(all_blocks_are_free)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(int(PATIENCE_S / 0.05)):
        if await condition():
            return
        await asyncio.sleep(0.05)
    pytest.fail("waited in vain")


async def said(value: bool) -> bool:
    return value
