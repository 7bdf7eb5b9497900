"""Handles on no workers at all, for tests of those that hold them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest

from kv_transfer.errors import LayoutMismatchError, PeerError
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.link_cost import LinkCost
from kv_transfer.region import Region
from kv_transfer.transports.base import EngineInfo
from workers.messages import StepOutput
from workers.runner.step_times import StepTimes
from workers.worker_host import WorkerInfo

PATIENCE_S = 20.0


class FakeWorker:
    """A handle on nothing, which writes down what it is told in a log shared by all."""

    def __init__(
        self,
        name: str,
        log: list[tuple],
        *,
        block_size: int = 16,
        error: Exception | None = None,
        unreachable: str | None = None,
    ) -> None:
        self.name = name
        self.role = name.split("-")[0]
        self.engine_id = f"{name}.{len([entry for entry in log if entry[:2] == ('spawn', name)])}"
        self.said: asyncio.Queue[list[StepOutput] | Exception] = asyncio.Queue()
        self._log, self._block_size, self._error, self.unreachable = log, block_size, error, unreachable
        log.append(("spawn", name))

    async def start(self, progress: Callable) -> WorkerInfo:
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error
        layout = KVLayout((GroupLayout("full", tuple(range(2)), self._block_size, 2, 16, "float32"),))
        self.endpoints = 0
        engine = self._engine = EngineInfo(self.engine_id, 1, layout, (Region(0, 2, 8, 1024),), "cpu", 0, b"")
        return WorkerInfo(self.name, self.role, (engine,), "cpu", "TORCH_SDPA", 100, 4, 8, StepTimes(), 0)

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> tuple[EngineInfo, ...]:
        there = peer[0].layout.primary.block_size
        if there != self._block_size:
            raise LayoutMismatchError(f"block_size is {self._block_size} here and {there} there")
        self.endpoints += 1
        return (replace(self._engine, endpoint=f"{self.engine_id}#{self.endpoints}"),)

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        self._log.append(("connect", self.engine_id, peer[0].engine_id))

    async def probe(self, engine_id: str) -> float:
        if engine_id == self.unreachable:
            raise PeerError(f"{engine_id} did not answer")
        return 0.001

    async def link_to(self, engine_id: str) -> LinkCost | None:
        self._log.append(("path", self.engine_id, engine_id))
        return LinkCost(write_s=0.002, descriptor_s=0.0, bytes_per_s=1e9)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        self._log.append(("disconnect", self.engine_id, engine_id))

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        while True:
            item = await self.said.get()
            if isinstance(item, Exception):
                raise item
            yield item

    async def stop(self) -> bool:
        self._log.append(("stop", self.engine_id))
        return True


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.001)):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("waited in vain")
