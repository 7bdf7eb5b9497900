"""A load as it is after it has lasted: requests that already run, more at random, and a look at a short window.

A service that starts empty takes as long as its longest request until its batches are as full as the rate makes them.
Here as many requests as the rate would have running are there from the beginning, with what is left of their answers
anywhere from nothing to all of it, as one would find them. When the window is over, what still runs is judged by what
it has had so far, and cancelled.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from benchmarks.load import poisson_arrivals
from benchmarks.measure import OK, Client
from benchmarks.metrics import Objective, Percentiles
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from workers.errors import BatonError
from workers.sampling_params import SamplingParams

RUNNING = "RUNNING"
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class StandingLoad:
    """What one client sends.

    Attributes:
        rate: requests a second.
        prompt_tokens: of each.
        output_tokens: of each.
        standing: requests that run from the beginning.
        starts_at: `time.perf_counter()` of the beginning, the same clock in every process of a machine.
        lead_s: from there to the first arrival: as long as the standing ones take to be prefilled.
        settle_s: from there to the window.
        window_s: requests that are due in it are judged.
        seed: of prompts and arrivals.
        vocab_size: prompts are token ids below it.
    """

    rate: float
    prompt_tokens: int
    output_tokens: int
    standing: int
    starts_at: float
    lead_s: float
    settle_s: float
    window_s: float
    seed: str
    vocab_size: int

    @property
    def ends_at(self) -> float:
        """When the window does, on the same clock."""
        return self.starts_at + self.lead_s + self.settle_s + self.window_s


@dataclass
class Sample:
    """A request of the window, seconds of the machine's clock.

    Attributes:
        due: when it should have been sent: its first token counts from here.
        sent: when it was.
        status: OK, RUNNING if it was cancelled at the window's end, or the name of its error.
        first: when its first token came; None if it has not.
        last: when its last token so far came.
        tokens: so far.
        longest_gap_s: between two messages.
        seen_until: when it ended or was cancelled.
    """

    due: float
    sent: float = 0.0
    status: str = RUNNING
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    longest_gap_s: float = 0.0
    seen_until: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first is None else self.first - self.due

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, so far; None with fewer than two."""
        return None if self.first is None or self.tokens < 2 else (self.last - self.first) / (self.tokens - 1)

    def meets(self, objective: Objective) -> bool | None:
        """Whether it meets limits on `ttft` and `tpot`; None: it was cancelled before that could be said."""
        if self.status not in (OK, RUNNING):
            return False
        ttft = self.seen_until - self.due if self.ttft_s is None else self.ttft_s
        if objective.ttft is not None and ttft > objective.ttft:
            return False
        if self.first is None:
            return None
        return objective.tpot is None or (self.tpot_s or 0.0) <= objective.tpot

    def take(self, at: float, tokens: int) -> None:
        """A message with tokens."""
        if self.first is None:
            self.first = at
        else:
            self.longest_gap_s = max(self.longest_gap_s, at - self.last)
        self.last = at
        self.tokens += tokens


def run_client(address: str, load: StandingLoad) -> list[Sample]:
    """Send a load from this process; the window's requests."""
    return asyncio.run(_connect_and_send(address, load))


async def _connect_and_send(address: str, load: StandingLoad) -> list[Sample]:
    async with AsyncBatonClient(Connection(address)) as client:
        return await send(client, load)


async def send(client: Client, load: StandingLoad) -> list[Sample]:
    """Send a load, wait until its window is over, cancel what runs; the window's requests in the order of sending."""
    rng = random.Random(f"{load.seed}/standing")
    left = [rng.randint(1, load.output_tokens) for _ in range(load.standing)]
    opens_at = load.starts_at + load.lead_s + load.settle_s
    due = [load.starts_at + load.lead_s + at for at in _until(load.settle_s + load.window_s, load.rate, load.seed)]
    prompts = _prompts(load, len(left) + len(due))
    await _sleep_until(load.starts_at)
    tasks = [asyncio.create_task(_request(client, next(prompts), tokens, Sample(load.starts_at))) for tokens in left]
    samples = []
    for at in due:
        await _sleep_until(at)
        sample = Sample(at)
        tasks.append(asyncio.create_task(_request(client, next(prompts), load.output_tokens, sample)))
        if at >= opens_at:
            samples.append(sample)
    await _sleep_until(load.ends_at)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return samples


async def _request(client: Client, prompt: tuple[int, ...], max_tokens: int, sample: Sample) -> None:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    sample.sent = time.perf_counter()
    stream = client.generate(token_ids=prompt, sampling=sampling, timeout_s=_TIMEOUT_S)
    try:
        async with aclosing(cast(Any, stream)) as chunks:
            async for chunk in chunks:
                if chunk.token_ids:
                    sample.take(time.perf_counter(), len(chunk.token_ids))
                if chunk.finish_reason is not None:
                    sample.status = OK
    except BatonClientError as error:
        sample.status = error.status.name
    except BatonError as error:
        sample.status = type(error).__name__
    finally:
        sample.seen_until = time.perf_counter()


def summary(samples: Sequence[Sample], objective: Objective) -> dict[str, Any]:
    """A window in numbers. `share` is of the requests of which it can be said whether they meet the objective."""
    judged = [met for sample in samples if (met := sample.meets(objective)) is not None]
    spread = {
        "ttft": Percentiles.of(sample.ttft_s for sample in samples),
        "tpot": Percentiles.of(sample.tpot_s for sample in samples),
        "longest_gap": Percentiles.of(sample.longest_gap_s for sample in samples if sample.tokens > 1),
        "sent_late": Percentiles.of(sample.sent - sample.due for sample in samples if sample.sent),
    }
    statuses = [sample.status for sample in samples]
    return {
        "requests": len(samples),
        "judged": len(judged),
        "share": sum(judged) / len(judged) if judged else 0.0,
        "by_status": {status: statuses.count(status) for status in sorted(set(statuses))},
        **{name: None if values is None else vars(values) for name, values in spread.items()},
    }


def _until(seconds: float, rate: float, seed: str) -> Iterator[float]:
    return itertools.takewhile(lambda at: at < seconds, poisson_arrivals(rate, seed))


def _prompts(load: StandingLoad, number: int) -> Iterator[tuple[int, ...]]:
    """All made before the first is sent, so that making them delays none."""
    rng = np.random.default_rng(list(load.seed.encode()))
    tokens = rng.integers(load.vocab_size, size=(number, load.prompt_tokens)).tolist()
    return iter([tuple(prompt) for prompt in tokens])


async def _sleep_until(when: float) -> None:
    await asyncio.sleep(max(0.0, when - time.perf_counter()))
