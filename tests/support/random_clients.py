"""Clients that stay, leave early, or give up while waiting; what they got must be the beginning of the right answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

from fleet import Fleet, prompt, tokens_of
from workers.errors import HandoffError

_MAX_TOKENS = 16


async def serve_random_clients(
    fleet: Fleet, expected: Callable[[list[int], int], list[int]], number: int, seed: int
) -> int:
    """Let so many come, on a fleet whose handoffs may fail; how many had their whole answer."""
    rng = random.Random(seed)
    known = [prompt(rng.randint(1, 80), seed=i) for i in range(6)]
    answers = [expected(token_ids, _MAX_TOKENS) for token_ids in known]

    async def client(which: int, length: int, leave_after: int | None) -> tuple[int, list[int], bool]:
        stream = fleet.start(known[which], length)
        got: list[int] = []
        async with contextlib.aclosing(stream):
            try:
                async for token in tokens_of(stream):
                    got.append(token)
                    if leave_after is not None and len(got) >= leave_after:
                        return which, got, False
            except HandoffError:
                return which, got, False
        return which, got, len(got) == length

    clients = []
    for _ in range(number):
        leave_after = rng.choice([None, None, rng.randint(1, 8)])
        length = rng.randint(1, _MAX_TOKENS)
        clients.append(asyncio.create_task(client(rng.randrange(len(known)), length, leave_after)))
        if rng.random() < 0.2:
            await asyncio.sleep(0.01)
        if rng.random() < 0.2:
            rng.choice(clients).cancel()
    complete = 0
    for outcome in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(outcome, asyncio.CancelledError):
            continue
        assert not isinstance(outcome, BaseException), outcome
        which, got, whole = outcome
        assert got == answers[which][: len(got)]
        complete += whole
    return complete
