"""What is asked of a running service, Baton's or a peer's: single prompts, a Poisson load, short requests."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.distributions import Fixed
from benchmarks.load import Limits, LoadRun, open_loop, poisson_arrivals
from benchmarks.measure import Client, Row, WallClock, measure_request
from benchmarks.metrics import summarize
from benchmarks.workload import RequestSpec, Workload
from workers.errors import ConfigError
from workers.sampling_params import SamplingParams

_TIMEOUT_S = 60.0
_QUANTILES = 201
_FIRST_PROMPT_TOKENS = 16

Report = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """Requests of equal lengths that arrive at random.

    Attributes:
        rate: requests a second.
        prompt_tokens: of each.
        output_tokens: of each.
        duration_s: how long requests are sent.
    """

    rate: float
    prompt_tokens: int
    output_tokens: int
    duration_s: float

    @classmethod
    def parse(cls, text: str) -> Load:
        """From RATE:PROMPT:OUTPUT:SECONDS.

        Raises:
            argparse.ArgumentTypeError: it is not four positive numbers.
        """
        parts = text.split(":")
        try:
            rate, prompt, output, duration = parts
            load = cls(float(rate), int(prompt), int(output), float(duration))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be RATE:PROMPT:OUTPUT:SECONDS") from None
        if min(load.rate, load.prompt_tokens, load.output_tokens, load.duration_s) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}: every number must be more than 0")
        return load

    def __str__(self) -> str:
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.rate:g}/s for {self.duration_s:g} s"


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked of the service."""
    points = parser.add_argument_group("requests")
    points.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 8000, 15000], metavar="N")
    points.add_argument("--requests", type=int, default=8, metavar="N", help="of each length (default: 8)")
    points.add_argument("--warmup", type=int, default=2, metavar="N", help="of each length, before (default: 2)")
    points.add_argument("--output-tokens", type=int, default=24, metavar="N", help="of each (default: 24)")
    points.add_argument(
        "--pause", type=float, default=0.3, metavar="S",
        help="before each of them: a GPU's clocks after idling are not those after work (default: %(default)s)",
    )  # fmt: skip
    points.add_argument("--alone", action="store_true", help="also send each prompt for a single token")
    points.add_argument(
        "--load", type=Load.parse, metavar="R:P:O:S", help="Poisson load: rate, prompt, output, seconds"
    )
    points.add_argument("--short", type=Load.parse, metavar="R:P:O:S", help="a second one, of short requests")
    points.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")


async def time_first_token(client: Client, vocab_size: int, started: float) -> float:
    """Send a short prompt to a service that has just become ready; seconds from `started` to its first token.

    Raises:
        ConfigError: the request failed.
    """
    clock = WallClock()
    prompt = _prompt(random.Random("first"), _FIRST_PROMPT_TOKENS, vocab_size)
    spec = RequestSpec(0, prompt, None, None, _greedy(4))
    row = await measure_request(client, spec, clock, started, clock.now() - started, _TIMEOUT_S)
    if not row.ok or row.first_token_s is None:
        raise ConfigError(f"the first request failed: {row.status} {row.error}")
    return row.first_token_s


async def measure_service(
    client: Client, args: argparse.Namespace, vocab_size: int, max_model_len: int, report: Report, found: dict[str, Any]
) -> None:
    """Ask what the flags say, and put what came of it into `found`, part by part."""
    found["lengths"] = []
    for length in args.lengths:
        result = await measure_length(client, length, args, vocab_size)
        found["lengths"].append(result)
        report(f"{length} tokens: TTFT {result['ttft_s'] * 1e3:.1f} ms, second {result['second_token_s'] * 1e3:.1f} ms")
    for name in ("load", "short"):
        load: Load | None = getattr(args, name)
        if load is not None:
            found[name] = await measure_load(client, load, args.seed, vocab_size, max_model_len)
            ttft, itl = found[name]["summary"]["ttft"], found[name]["summary"]["itl"]
            if ttft and itl:
                report(f"{load}: TTFT p50 {ttft['p50'] * 1e3:.1f} ms, ITL p50 {itl['p50'] * 1e3:.2f}, p99 "
                       f"{itl['p99'] * 1e3:.2f} ms, {found[name]['summary']['by_status']}")  # fmt: skip


async def measure_length(client: Client, length: int, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Prompts of one length, one at a time: medians, and every request.

    Each is sent after the same pause: a GPU that has just worked runs at other clocks than one that has idled, and what
    is compared must not differ by what came before it.

    Raises:
        ConfigError: a request failed.
    """
    rng = random.Random(f"{args.seed}/length/{length}")
    rows, alone = [], []
    for index in range(args.warmup + args.requests):
        prompt = _prompt(rng, length, vocab_size)
        spec = RequestSpec(index, prompt, None, None, _greedy(args.output_tokens))
        await asyncio.sleep(args.pause)
        row = await _one(client, spec)
        if args.alone:
            await asyncio.sleep(args.pause)
            single = await _one(client, replace(spec, sampling=_greedy(1)))
            alone.append(single)
        rows.append(row)
    rows, alone = rows[args.warmup :], alone[args.warmup :]
    ttft = [_ttft(row) for row in rows]
    reports = [row.report for row in rows if row.report is not None]
    transfer, exposed = (sum(values) for values in _transfers(reports))
    return {
        "prompt_tokens": length,
        "ttft_s": statistics.median(ttft),
        "second_token_s": statistics.median(t + row.itl_s[0] for t, row in zip(ttft, rows, strict=True)),
        "itl_s": statistics.median(interval for row in rows for interval in row.itl_s[1:]),
        "alone_ttft_s": statistics.median(map(_ttft, alone)) if alone else None,
        "exposed_s": statistics.median(_transfers(reports)[1]) if reports else None,
        "hidden_share": 1.0 - min(1.0, exposed / transfer) if transfer > 0 else None,
        "requests": [asdict(row) for row in rows],
        "alone": [asdict(row) for row in alone],
    }


async def measure_load(client: Client, load: Load, seed: int, vocab_size: int, max_model_len: int) -> dict[str, Any]:
    """A Poisson load: its summary, the quantiles of all intervals between tokens, and every request without them."""
    workload = Workload(Fixed(load.prompt_tokens), Fixed(load.output_tokens), seed, vocab_size, max_model_len)
    requests = [workload.request(index) for index in range(_expected(load))]
    limits = Limits(len(requests), load.duration_s, _TIMEOUT_S)
    arrivals = poisson_arrivals(load.rate, seed)
    run: LoadRun = await open_loop(client, requests.__getitem__, arrivals, limits, WallClock())
    intervals = [interval for row in run.rows if row.ok for interval in row.itl_s]
    quantiles = np.quantile(intervals, np.linspace(0.0, 1.0, _QUANTILES)).tolist() if intervals else []
    rows = [{**asdict(row), "itl_s": [], "ttft_s": row.ttft_s, "tpot_s": row.tpot_s} for row in run.rows]
    return {
        "load": asdict(load),
        "summary": asdict(summarize(run.rows, run.duration_s)),
        "itl_quantiles_s": quantiles,
        "requests": rows,
    }


def _expected(load: Load) -> int:
    """More requests than will arrive: they are made before the first is sent, so that making them delays none."""
    mean = load.rate * load.duration_s
    return int(mean + 6 * mean**0.5) + 1


async def _one(client: Client, spec: RequestSpec) -> Row:
    clock = WallClock()
    row = await measure_request(client, spec, clock, clock.now(), 0.0, _TIMEOUT_S)
    wanted = spec.sampling.max_tokens or 0
    if not row.ok or row.output_tokens < wanted:
        raise ConfigError(
            f"request {spec.index} brought {row.output_tokens} of {wanted} tokens: {row.status} {row.error}"
        )
    return row


def _ttft(row: Row) -> float:
    assert row.ttft_s is not None
    return row.ttft_s


def _transfers(reports: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [report.transfer_s for report in reports], [report.exposed_transfer_s for report in reports]


def _prompt(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(vocab_size) for _ in range(length))


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
