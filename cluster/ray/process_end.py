"""Whether a rank's process is gone, as the machine says on which it ran: Ray itself counts a worker as dead as soon as
it has been told to kill it, or has lost its node."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kv_transfer.process import ProcessId

DYING_S = 3.0
"""How long a process that was killed is watched on its machine until it is gone."""
_LOOK_INTERVAL_S = 0.02
PATIENCE_S = 6.0
"""How long a machine has to answer. One that is frozen or cut off says nothing."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank runs: the node, by Ray's id, and the process on it."""

    node_id: str
    process: ProcessId

    @classmethod
    def own(cls) -> Whereabouts:
        """Of the calling worker."""
        return cls(ray.get_runtime_context().get_node_id(), ProcessId.own())


async def ended(rank: Whereabouts) -> bool:
    """Have the machine of a rank end its process, and say whether it is gone."""
    there = NodeAffinitySchedulingStrategy(rank.node_id, soft=False)
    look = ray.remote(num_cpus=0, max_retries=0)(end).options(scheduling_strategy=there)
    return bool(await look.remote(rank.process))


async def all_ended(
    ranks: Sequence[Whereabouts],
    patience_s: float = PATIENCE_S,
    look: Callable[[Whereabouts], Awaitable[bool]] = ended,
) -> bool:
    """Whether every one of these processes is gone for certain; False: one may run, or its machine does not answer.

    Args:
        ranks: where they run.
        patience_s: how long a machine has to answer.
        look: asks it.
    """
    answers = asyncio.gather(*(look(rank) for rank in ranks))
    with contextlib.suppress(Exception):
        return all(await asyncio.wait_for(answers, patience_s))
    return False


def end(process: ProcessId) -> bool:
    """End a process that nobody wants any more, and say whether it is gone; runs on the process's machine.

    Ray asks a process to end itself before it ends it, for which one that is frozen has no ear.
    """
    process.kill(ProcessId.own())
    return has_ended(process)


def has_ended(process: ProcessId) -> bool:
    """Whether a process is gone; runs on the process's machine. One that it cannot look at may run."""
    viewer, give_up_at = ProcessId.own(), time.monotonic() + DYING_S
    while (runs := process.may_run(viewer)) and time.monotonic() < give_up_at:
        time.sleep(_LOOK_INTERVAL_S)
    return runs is False
