"""Notices a worker that has fallen silent, or that lives and does not get on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.errors import WorkerSilentError, WorkerStuckError
from cluster.pools.patience import Patience
from cluster.pools.replica import Replica

_ROUNDS = 4


async def listen_for(
    listening: asyncio.Future[None],
    num_heard: Callable[[], int],
    silence_s: float | None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Wait until a listener ends, as long as it hears something now and then.

    Silence is counted in rounds of waiting, not read off a clock: when this process itself was held up, everybody
    seems silent, and what they said meanwhile is heard before the next round ends.

    Args:
        listening: the listener; cancelled if it hears nothing any more.
        num_heard: how many times it has heard something.
        silence_s: after so long a silence the worker is taken for lost; None: never.
        look: called after every round in which something was heard; what it raises is the end.

    Raises:
        WorkerSilentError: it was silent for so long.
        Exception: what the listener or `look` raises.
    """
    last, silent = num_heard(), 0
    try:
        while silent < _ROUNDS:
            done, _ = await asyncio.wait({listening}, timeout=None if silence_s is None else silence_s / _ROUNDS)
            if done:
                return listening.result()
            heard = num_heard()
            if heard != last:
                look()
            silent = 0 if heard != last else silent + 1
            last = heard
    finally:
        listening.cancel()
        await asyncio.wait({listening})
    raise WorkerSilentError(f"nothing was heard of it for {silence_s:g} s")


def look_at_progress(replica: Replica, patience: Patience) -> bool:
    """Judge a member by its last heartbeat: one whose step takes too long gets no requests until it has ended.

    Returns:
        Whether its state has changed.

    Raises:
        WorkerStuckError: the step will not end.
        WorkerSilentError: a rank of it is frozen.
    """
    heartbeat, info = replica.heartbeat, replica.info
    if heartbeat is None or info is None:
        return False
    if heartbeat.silent_ranks:
        ranks = ", ".join(map(str, heartbeat.silent_ranks))
        raise WorkerSilentError(f"nothing is heard of its rank {ranks}, which is frozen")
    if heartbeat.step_s >= patience.stuck_after_s(info):
        raise WorkerStuckError(
            f"its step has taken {heartbeat.step_s:.0f} s, {patience.stuck_after_s(info):.0f} are allowed"
        )
    stalled = heartbeat.step_s >= patience.stalled_after_s(info)
    before = replica.state
    if before in ("ready", "stalled"):
        replica.state = "stalled" if stalled else "ready"
    return replica.state != before
