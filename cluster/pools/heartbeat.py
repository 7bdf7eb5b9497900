"""Notices a worker that has fallen silent: a node that is gone without a word closes no connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.errors import WorkerSilentError


async def listen_for(listening: asyncio.Future[None], num_heard: Callable[[], int], silence_s: float | None) -> None:
    """Wait until a listener ends, as long as it hears something now and then.

    Silence is counted in rounds of waiting, not read off a clock: when this process itself was held up, everybody
    seems silent, and what they said meanwhile is heard before the next round ends.

    Args:
        listening: the listener; cancelled if it hears nothing any more.
        num_heard: how many times it has heard something.
        silence_s: after so long a silence the worker is taken for lost; None: never.

    Raises:
        WorkerSilentError: it was silent for so long.
        Exception: what the listener raises.
    """
    rounds = 4
    last, silent = num_heard(), 0
    try:
        while silent < rounds:
            done, _ = await asyncio.wait({listening}, timeout=None if silence_s is None else silence_s / rounds)
            if done:
                return listening.result()
            heard = num_heard()
            silent = 0 if heard != last else silent + 1
            last = heard
    finally:
        listening.cancel()
        await asyncio.wait({listening})
    raise WorkerSilentError(f"nothing was heard of it for {silence_s:g} s")
