"""What a worker that does not start is waiting for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from cluster.ray.placement_group import RankResources

logger = logging.getLogger(__name__)

PATIENCE_S = 20.0


def awaited(resources: RankResources, ranks: int, free: Mapping[str, float]) -> str:
    """What so many ranks wait for, where so much of the Ray cluster is free: room, or their processes alone.

    Room may be there in all and not on any one node, which the cluster's totals do not show.
    """
    asked = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    asked = {name: ranks * amount for name, amount in asked.items() if amount}
    missing = [name for name, amount in asked.items() if free.get(name, 0.0) < amount]
    if not missing:
        return "a process, or room on one node: the Ray cluster has what it asks for, " + _amounts(asked)
    some = {name: free.get(name, 0.0) for name in asked}
    return f"room in the Ray cluster: it asks for {_amounts(asked)}, and {_amounts(some)} are free"


async def tell_if_it_takes_long(name: str, ask: Callable[[], str]) -> None:
    """Say once what a worker waits for, if this is not cancelled before; `ask` is called in a thread."""
    await asyncio.sleep(PATIENCE_S)
    logger.warning("%s waits for %s", name, await asyncio.to_thread(ask))


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
