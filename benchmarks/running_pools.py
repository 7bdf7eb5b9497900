"""A service of some prefill and decode workers, started for a benchmark, and what it bears."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.client_processes import ClientProcesses
from benchmarks.goodput_search import Try, found, next_rate
from benchmarks.gpu_handoff import command
from benchmarks.measure import WallClock, measure_request
from benchmarks.metrics import Objective
from benchmarks.model_shapes import MODEL_HELP
from benchmarks.server_process import ServerProcess, server_process
from benchmarks.standing_load import StandingLoad, summary
from benchmarks.workload import RequestSpec
from cluster.api import WorkerStatus
from cluster.client.client import AsyncBatonClient, Connection
from workers.errors import ConfigError
from workers.sampling_params import SamplingParams

_READY = re.compile(r"^Baton serves \S+ on (\S+) \(", re.MULTILINE)
_TIMEOUT_S = 10.0
_IDLE_TOKENS, _IDLE_REQUESTS = 8, 3
_DRAIN_S, _POLL_S = 1.5, 0.1
_PREPARE_S = 0.6
_LONGEST_LEAD_S = 5.0
_LEAST_S = 3.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """Requests of equal lengths, and what each should meet.

    Attributes:
        name: of the workload.
        prompt_tokens: of each request.
        output_tokens: of each request.
        objective: limits on TTFT and TPOT.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    objective: Objective

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """How a rate is tried.

    Attributes:
        settle_s: before the window.
        window_s: requests due in it are judged.
        share: of them that must meet their objective.
        most: rates that are tried for one workload.
        seed: of prompts and arrivals.
    """

    settle_s: float
    window_s: float
    share: float
    most: int
    seed: int


@dataclass(frozen=True)
class RunningPools:
    """A service that is ready.

    Attributes:
        server: its process.
        address: where it listens.
        client: of this process.
        clients: of other processes, for load.
        workers: as they were when it had started.
        vocab_size: of the model.
        start_s: from the start of the process to ready.
    """

    server: ServerProcess
    address: str
    client: AsyncBatonClient
    clients: ClientProcesses
    workers: Sequence[WorkerStatus]
    vocab_size: int
    start_s: float

    async def idle(self, asked: Asked) -> dict[str, float]:
        """Medians of a few requests, one at a time: `ttft_s` and `itl_s`; the first one does not count."""
        rows = []
        for index in range(_IDLE_REQUESTS + 1):
            rng = random.Random(f"idle/{asked.name}/{index}")
            prompt = tuple(rng.randrange(self.vocab_size) for _ in range(asked.prompt_tokens))
            tokens = min(_IDLE_TOKENS, asked.output_tokens)
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=tokens, ignore_eos=True)
            clock = WallClock()
            spec = RequestSpec(index, prompt, None, None, sampling)
            row = await measure_request(self.client, spec, clock, clock.now(), 0.0, _TIMEOUT_S)
            if not row.ok or row.ttft_s is None:
                raise ConfigError(f"a request to the idle service failed: {row.status} {row.error}")
            rows.append((row.ttft_s, row.itl_s[-1] if row.itl_s else 0.0))
        middle = _IDLE_REQUESTS // 2
        ttft, itl = (sorted(values)[middle] for values in zip(*rows[1:], strict=True))
        return {"ttft_s": ttft, "itl_s": itl}

    async def try_rate(
        self, asked: Asked, rate: float, standing: float, lead_s: float, window: Window
    ) -> dict[str, Any]:
        """One rate: what came of its window.

        Args:
            asked: the requests.
            rate: of them, a second.
            standing: how many run at that rate.
            lead_s: what their prompts take.
            window: how it is tried.
        """
        load = StandingLoad(
            rate, asked.prompt_tokens, asked.output_tokens, round(standing), time.perf_counter() + _PREPARE_S,
            min(lead_s, _LONGEST_LEAD_S), window.settle_s, window.window_s,
            f"{window.seed}/{asked.name}/{rate:.3f}", self.vocab_size,
        )  # fmt: skip
        before, began = self.server.cpu_seconds(), time.perf_counter()
        samples = await self.clients.send(self.address, load)
        busy = (self.server.cpu_seconds() - before) / (time.perf_counter() - began)
        drain_s = await self._drain()
        about = {"rate": rate, "standing": load.standing, "lead_s": load.lead_s, "gateway_cores": busy}
        about["drain_s"] = drain_s
        return {**about, **summary(samples, asked.objective)}

    async def search(
        self,
        asked: Asked,
        guess: float,
        standing: Callable[[float], float],
        lead_s: Callable[[float], float],
        window: Window,
        until: float,
        report: Report,
        here: dict[str, Any],
    ) -> None:
        """Rates around `guess` until the answer is close, `window.most` were tried, or another would not end in time.

        Args:
            asked: the requests.
            guess: the first rate.
            standing: requests that run at a rate.
            lead_s: what so many prompts take.
            window: how a rate is tried.
            until: `time.perf_counter()` by which the last one has ended; the first is tried in any case.
            report: told of each.
            here: gets "tried", what came of each, and "goodput", what they say together.
        """
        tried = here.setdefault("tried", [])
        tries: list[Try] = []
        while len(tries) < window.most and (rate := next_rate(tries, guess, window.share)) is not None:
            number = standing(rate)
            lead = min(lead_s(number), _LONGEST_LEAD_S)
            needs_s = _PREPARE_S + lead + window.settle_s + window.window_s + _DRAIN_S
            if tries and time.perf_counter() + needs_s > until:
                return
            tried.append(await self.try_rate(asked, rate, number, lead, window))
            tries.append(Try(rate, tried[-1]["share"]))
            here["goodput"] = asdict(found(tries, window.share))
            report(_line(asked, tried[-1]))

    async def _drain(self) -> float:
        """Until nothing runs any more, as far as workers have said, or a moment is over; how long that took."""
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < _DRAIN_S:
            await asyncio.sleep(_POLL_S)
            loads = [worker.load for worker in await self.client.workers(_TIMEOUT_S)]
            if not any(load.running or load.waiting or load.reserved_blocks or load.preempted for load in loads):
                break
        return seconds


@asynccontextmanager
async def running_pools(
    args: argparse.Namespace,
    folder: Path,
    environ: Mapping[str, str],
    settings: Mapping[str, Any],
    log: Path,
    clients: ClientProcesses,
    until: float,
) -> AsyncIterator[RunningPools]:
    """Start `baton up` with these settings over the benchmark's own, and stop it when the block ends.

    The block is left at `until`, `time.perf_counter()`, at the latest.

    Raises:
        ConfigError: it did not start, or the block was left because of the time.
    """
    own = [f"{key}={value}" for key, value in settings.items()]
    words = command(argparse.Namespace(**{**vars(args), "set": [*own, *args.set]}), folder)
    with server_process(words, environ, log) as server:

        def address() -> str | None:
            match = _READY.search(server.text())
            return match[1] if match else None

        try:
            async with asyncio.timeout(max(_LEAST_S, until - time.perf_counter())):
                where = await server.wait_for(address, args.start_timeout)
                start_s = time.perf_counter() - server.started
                async with AsyncBatonClient(Connection(where)) as client:
                    model, workers = await client.model_info(_TIMEOUT_S), await client.workers(_TIMEOUT_S)
                    yield RunningPools(server, where, client, clients, workers, model.vocab_size, start_s)
        except TimeoutError:
            raise ConfigError(f"the time is over; the service said last: {server.tail()[-500:]}") from None


def time_for(until: float, parts: int) -> float:
    """When the first of so many equal parts of what is left must end; `time.perf_counter()`."""
    now = time.perf_counter()
    return now + max(_LEAST_S, (until - now) / max(1, parts))


def add_arguments(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Add the flags that benchmarks of pools have in common, `gpu_handoff.command`'s among them."""
    add_window_arguments(parser, seconds)
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    parser.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--max-model-len", type=int, default=16384, metavar="N", help="default: 16384")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="default: 8192")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="of decode (default: 256)")
    parser.add_argument("--start-timeout", type=float, default=120.0, metavar="S", help="default: 120")
    parser.add_argument("--kernel-cache", type=Path, metavar="DIR", help="where compiled kernels are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of `baton up`")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run that results belong to")
    parser.add_argument("--note", default="", help="what else is to be known of the run")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of the servers, one after the other")


def add_window_arguments(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Add the flags that say how rates are tried, and in which time."""
    parser.add_argument(
        "--seconds", type=float, default=seconds, metavar="S", help="for everything (default: %(default)s)"
    )
    parser.add_argument("--window", type=float, default=8.0, metavar="S", help="that a rate is looked at (default: 8)")
    parser.add_argument("--settle", type=float, default=1.0, metavar="S", help="before it (default: 1)")
    parser.add_argument("--tries", type=int, default=4, metavar="N", help="rates for a workload at most (default: 4)")
    parser.add_argument("--share", type=float, default=0.9, metavar="X", help="that must be met (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="processes that send (default: 4)")


def parse_asked(text: str) -> Asked:
    """From NAME:PROMPT:OUTPUT:TTFT_MS:TPOT_MS.

    Raises:
        argparse.ArgumentTypeError: it is not that.
    """
    try:
        name, prompt, output, ttft, tpot = text.split(":")
        asked = Asked(name, int(prompt), int(output), Objective(ttft=float(ttft) / 1e3, tpot=float(tpot) / 1e3))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME:PROMPT:OUTPUT:TTFT_MS:TPOT_MS") from None
    if min(asked.prompt_tokens, asked.output_tokens, asked.objective.ttft or 0, asked.objective.tpot or 0) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: every number must be more than 0")
    return asked


def _line(asked: Asked, tried: Mapping[str, Any]) -> str:
    ttft, tpot = tried["ttft"] or {}, tried["tpot"] or {}
    return (
        f"{asked.name} at {tried['rate']:.2f}/s: {tried['share']:.1%} of {tried['judged']}, TTFT p50 "
        f"{ttft.get('p50', 0) * 1e3:.0f} p90 {ttft.get('p90', 0) * 1e3:.0f} ms, TPOT p50 "
        f"{tpot.get('p50', 0) * 1e3:.2f} p90 {tpot.get('p90', 0) * 1e3:.2f} ms, "
        f"gateway {tried['gateway_cores']:.2f} cores, {tried['by_status']}"
    )
