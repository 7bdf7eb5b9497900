"""What is asked of a running service, Baton's or a peer's: single prompts, a Poisson load, short requests."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
_FIRST_REQUESTS = 3

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


@dataclass(frozen=True)
class Turn:
    """Who is asked for a prompt's answer.

    Attributes:
        client: of the service.
        alone: the answer ends with its first token: on a pair nothing is handed over.
    """

    client: Client
    alone: bool = False


@dataclass(frozen=True)
class LongPrompts:
    """Prompts that take seconds are sent less often.

    Attributes:
        above: tokens from which a prompt is one of them.
        requests: of each length.
        warmup: of each length, before.
    """

    above: int
    requests: int
    warmup: int

    @classmethod
    def parse(cls, text: str) -> LongPrompts:
        """From TOKENS:REQUESTS:WARMUP.

        Raises:
            argparse.ArgumentTypeError: it is not three whole numbers, or there is no request.
        """
        try:
            above, requests, warmup = map(int, text.split(":"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be TOKENS:REQUESTS:WARMUP") from None
        if min(above, warmup) < 0 or requests < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: there must be at least one request")
        return cls(above, requests, warmup)


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked of the service."""
    points = parser.add_argument_group("requests")
    points.add_argument(
        "--first-tokens", type=int, default=512, metavar="N",
        help="of the first requests to a new service (default: 512)",
    )  # fmt: skip
    points.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 8000, 15000], metavar="N")
    points.add_argument("--requests", type=int, default=8, metavar="N", help="of each length (default: 8)")
    points.add_argument("--warmup", type=int, default=2, metavar="N", help="of each length, before (default: 2)")
    points.add_argument(
        "--long", type=LongPrompts.parse, default=LongPrompts(20000, 3, 1), metavar="N:R:W",
        help="of prompts longer than N tokens: R requests, W before (default: 20000:3:1)",
    )  # fmt: skip
    points.add_argument("--output-tokens", type=int, default=24, metavar="N", help="of each (default: 24)")
    points.add_argument(
        "--pause", type=float, default=0.3, metavar="S",
        help="before each of them: a GPU's clocks after idling are not those after work (default: %(default)s)",
    )  # fmt: skip
    points.add_argument("--alone", action="store_true", help="also send each prompt for a single token")
    points.add_argument(
        "--load", type=Load.parse, nargs="*", default=[], metavar="R:P:O:S",
        help="Poisson loads, one after the other: rate, prompt, output, seconds",
    )  # fmt: skip
    points.add_argument("--short", type=Load.parse, metavar="R:P:O:S", help="a second one, of short requests")
    points.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")


async def first_requests(
    client: Client, args: argparse.Namespace, vocab_size: int, started: float, found: dict[str, Any]
) -> None:
    """Send equal requests, one at a time, to a service that has just become ready and has served none.

    Puts into `found` what came of them, "first", and "first_token_s", seconds from `started` to the first token.

    Raises:
        ConfigError: one failed.
    """
    clock, rng, rows = WallClock(), random.Random("first"), []
    for index in range(_FIRST_REQUESTS):
        prompt = _prompt(rng, args.first_tokens, vocab_size)
        spec = RequestSpec(index, prompt, None, None, _greedy(args.output_tokens))
        row = await measure_request(client, spec, clock, started, clock.now() - started, _TIMEOUT_S)
        if not row.ok or row.first_token_s is None:
            raise ConfigError(f"one of the first requests failed: {row.status} {row.error}")
        rows.append(row)
    found["first_token_s"] = rows[0].first_token_s
    found["first"] = {
        "prompt_tokens": args.first_tokens,
        "ttft_s": [_ttft(row) for row in rows],
        "second_token_s": [_ttft(row) + row.itl_s[0] for row in rows],
    }


async def measure_service(
    client: Client, args: argparse.Namespace, vocab_size: int, max_model_len: int, report: Report, found: dict[str, Any]
) -> None:
    """Ask what the flags say, and put what came of it into `found`, part by part."""
    found["lengths"] = []
    turns = [Turn(client), *([Turn(client, alone=True)] if args.alone else [])]
    for length in args.lengths:
        whole, *alone = await measure_length(turns, length, args, vocab_size)
        found["lengths"].append(length_result(length, whole, alone[0] if alone else ()))
        report(line_of(found["lengths"][-1]))
    await measure_loads(client, args, vocab_size, max_model_len, report, found)


async def measure_loads(
    client: Client, args: argparse.Namespace, vocab_size: int, max_model_len: int, report: Report, found: dict[str, Any]
) -> None:
    """The Poisson loads that the flags ask for."""
    found["loads"] = []
    for load in args.load:
        found["loads"].append(await measure_load(client, load, args.seed, vocab_size, max_model_len))
        report(_line_of_load(load, found["loads"][-1]))
    if args.short is not None:
        found["short"] = await measure_load(client, args.short, args.seed, vocab_size, max_model_len)
        report(_line_of_load(args.short, found["short"]))


async def measure_length(
    turns: Sequence[Turn], length: int, args: argparse.Namespace, vocab_size: int
) -> list[list[Row]]:
    """Prompts of one length, one at a time, each to every service in turn; the rows of each turn.

    Every request is sent after the same pause: a GPU that has just worked runs at other clocks than one that has idled,
    and what is compared must not differ by what came before it. Taking turns with each prompt spreads what drifts, such
    as a card's temperature, over all of them.

    Raises:
        ConfigError: a request failed.
    """
    rng = random.Random(f"{args.seed}/length/{length}")
    warmup, requests = (args.warmup, args.requests)
    if length > args.long.above:
        warmup, requests = args.long.warmup, args.long.requests
    rows: list[list[Row]] = [[] for _ in turns]
    for index in range(warmup + requests):
        prompt = _prompt(rng, length, vocab_size)
        for turn, here in zip(turns, rows, strict=True):
            spec = RequestSpec(index, prompt, None, None, _greedy(1 if turn.alone else args.output_tokens))
            await asyncio.sleep(args.pause)
            here.append(await _one(turn.client, spec))
    return [here[warmup:] for here in rows]


def length_result(length: int, rows: Sequence[Row], alone: Sequence[Row] = ()) -> dict[str, Any]:
    """What prompts of one length took: medians, and every request."""
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


def line_of(result: dict[str, Any]) -> str:
    """What `length_result` says, for people who watch."""
    ttft, second = result["ttft_s"] * 1e3, result["second_token_s"] * 1e3
    return f"{result['prompt_tokens']} tokens: TTFT {ttft:.1f} ms, second {second:.1f} ms"


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


def _line_of_load(load: Load, result: dict[str, Any]) -> str:
    ttft, itl, statuses = (result["summary"][name] for name in ("ttft", "itl", "by_status"))
    if not ttft or not itl:
        return f"{load}: {statuses}"
    return (
        f"{load}: TTFT p50 {ttft['p50'] * 1e3:.1f} ms, ITL p50 {itl['p50'] * 1e3:.2f}, "
        f"p99 {itl['p99'] * 1e3:.2f} ms, {statuses}"
    )


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
