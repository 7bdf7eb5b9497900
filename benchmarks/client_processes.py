"""Clients in processes of their own: one is too slow to read what several GPUs generate."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import TracebackType

from benchmarks.standing_load import Sample, StandingLoad, run_client

_START_S = 0.3


class ClientProcesses:
    """As many processes as are asked for, each of which sends its part of a load.

    The parts are Poisson arrivals at equal rates, and so Poisson arrivals at the whole rate.

    Args:
        number: of processes.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._pool = ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> ClientProcesses:
        """Start them; they import what they need meanwhile."""
        for _ in range(self._number):
            self._pool.submit(time.sleep, _START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End them."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def send(self, address: str, load: StandingLoad) -> list[Sample]:
        """Send a load from all of them; the window's requests."""
        loop = asyncio.get_running_loop()
        parts = await asyncio.gather(
            *(loop.run_in_executor(self._pool, run_client, address, part) for part in split_load(load, self._number))
        )
        return sorted((sample for part in parts for sample in part), key=lambda sample: sample.due)


def split_load(load: StandingLoad, number: int) -> list[StandingLoad]:
    """Parts of a load that together are the whole."""
    standing = [load.standing // number + (index < load.standing % number) for index in range(number)]
    return [
        replace(load, rate=load.rate / number, standing=count, seed=f"{load.seed}/{index}")
        for index, count in enumerate(standing)
    ]
