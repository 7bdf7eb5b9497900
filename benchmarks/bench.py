"""`baton bench`: load on a running service, and what its clients saw of it."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.distributions import FORMS, parse_distribution
from benchmarks.environment import Environment
from benchmarks.interruption import load_until_interrupted
from benchmarks.load import Limits, LoadRun, OnRow, closed_loop, open_loop, poisson_arrivals
from benchmarks.measure import Row, WallClock
from benchmarks.metrics import Objective, summarize
from benchmarks.report import print_summary, run_to_json, write_json
from benchmarks.workload import PROMPT_KINDS, Workload
from cluster.api import ModelInfo
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.cli.exit_codes import EXIT_INTERRUPTED
from cluster.client.client import AsyncBatonClient
from workers.errors import ConfigError
from workers.sampling_params import SamplingParams

_DEFAULT_REQUESTS = 100
_INFO_TIMEOUT_S = 10.0
_EPILOG = f"""\
load:
  --rate R         open loop: requests arrive at random (Poisson), R per second on average, however many are under
                   way. Latencies count from the time at which a request was due, so a service that cannot keep up
                   shows it (no coordinated omission).
  --concurrency N  closed loop: N requests under way at any time; the next one is sent when one ends.

lengths (DIST): {FORMS}; a bare number is fixed. What does not fit the model's context window is cut.

examples:
  baton bench --concurrency 4 --requests 64
  baton bench --rate 5 --duration 60 --prompt-tokens lognormal:300:0.8 --output-tokens uniform:16:128 \\
      --slo ttft=500,itl=50 --output run.json --plot run.png
  baton bench --prompts recall --prompt-tokens uniform:50:450 --output-tokens 5    (the shipped model: checks answers)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Put load on a Baton server and measure what its clients see."
    parser.epilog = _EPILOG
    load = parser.add_argument_group("load")
    kind = load.add_mutually_exclusive_group()
    kind.add_argument("--rate", type=float, metavar="R", help="open loop: requests per second")
    kind.add_argument("--concurrency", type=int, metavar="N", help="closed loop: requests under way (default: 1)")
    load.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help=f"send at most this many (default: {_DEFAULT_REQUESTS}, or no limit with --duration)",
    )
    load.add_argument("--duration", type=float, metavar="S", help="send nothing after this many seconds")
    load.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before, not counted (default: 1)")
    load.add_argument("--timeout", type=float, default=120.0, metavar="S", help="deadline of a request (default: 120)")
    what = parser.add_argument_group("requests")
    what.add_argument("--prompts", choices=PROMPT_KINDS, default="random", help="random token ids (default), or recall")
    what.add_argument("--prompt-tokens", default="fixed:256", metavar="DIST", help="lengths (default: fixed:256)")
    what.add_argument(
        "--output-tokens", default="fixed:64", metavar="DIST", help="tokens to generate (default: fixed:64)"
    )
    what.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths, prompts, arrivals, sampling")
    what.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate exactly what was asked for (default)",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--slo", metavar="LIMITS", help="count the requests within all of ttft=MS,itl=MS,tpot=MS,e2e=MS (any of them)"
    )
    results.add_argument("--output", type=Path, metavar="FILE", help="write everything measured as JSON")
    results.add_argument("--plot", type=Path, metavar="FILE", help="draw TTFT, ITL and a timeline as PNG")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command: 1 if every request failed, 130 if Ctrl-C ended it; what was measured by then is kept."""
    _check(args)
    objective = None if args.slo is None else Objective.parse(args.slo)
    if args.plot is not None:
        from benchmarks.plot import check_plotting

        check_plotting()
    environment = Environment.capture(threads=None)
    model, load = asyncio.run(_measure(args))
    if load.interrupted:
        if not load.rows:
            raise KeyboardInterrupt
        print(f"interrupted: what follows is of the {len(load.rows)} requests that had ended", file=sys.stderr)
    summary = summarize(load.rows, load.duration_s, objective)
    from rich.console import Console

    print_summary(Console(), summary, load.rows)
    if args.output is not None:
        config = {**_config(args), "interrupted": load.interrupted}
        write_json(args.output, run_to_json(environment, config, model, summary, load.rows))
    if args.plot is not None:
        from benchmarks.plot import write_plot

        write_plot(args.plot, load.rows, load.duration_s, f"{model.name}, {_load_text(args)}")
    if load.interrupted:
        return EXIT_INTERRUPTED
    return 0 if any(row.ok for row in load.rows) else 1


def _check(args: argparse.Namespace) -> None:
    """Refuse wrong flags before anything is sent."""
    positive = {"--rate": args.rate, "--concurrency": args.concurrency, "--requests": args.requests}
    positive |= {"--duration": args.duration, "--timeout": args.timeout}
    for flag, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{flag} is {value:g}, it must be more than 0")
    if args.warmup < 0:
        raise ConfigError(f"--warmup is {args.warmup}, it must be at least 0")
    for text in (args.prompt_tokens, args.output_tokens):
        parse_distribution(text)
    SamplingParams(temperature=args.temperature)


async def _measure(args: argparse.Namespace) -> tuple[ModelInfo, LoadRun]:
    """Connect, warm up, and put the load on."""
    async with AsyncBatonClient(connection_of(args)) as client:
        model = await client.model_info(_INFO_TIMEOUT_S)
        workload = Workload(
            parse_distribution(args.prompt_tokens),
            parse_distribution(args.output_tokens),
            args.seed,
            model.vocab_size,
            model.max_model_len,
            args.prompts,
            args.temperature,
            args.ignore_eos,
        )
        if args.warmup:
            # Other requests than those that are counted, so that nothing that might be cached helps them.
            warmup = Limits(args.warmup, None, args.timeout)
            await closed_loop(client, lambda index: workload.request(-1 - index), 1, warmup, WallClock())
        return model, await _with_progress(args, client, workload)


async def _with_progress(args: argparse.Namespace, client: AsyncBatonClient, workload: Workload) -> LoadRun:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    requests = args.requests or (None if args.duration else _DEFAULT_REQUESTS)
    limits = Limits(requests, args.duration, args.timeout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(_load_text(args), total=requests)
        failed = 0

        def on_row(row: Row) -> None:
            nonlocal failed
            failed += not row.ok
            text = _load_text(args) + (f", {failed} failed" if failed else "")
            progress.update(task, advance=1, description=text)

        return await load_until_interrupted(
            lambda tell: _load(args, client, workload, limits, tell), WallClock(), on_row
        )


async def _load(
    args: argparse.Namespace,
    client: AsyncBatonClient,
    workload: Workload,
    limits: Limits,
    on_row: OnRow,
) -> LoadRun:
    if args.rate is not None:
        arrivals = poisson_arrivals(args.rate, args.seed)
        return await open_loop(client, workload.request, arrivals, limits, WallClock(), on_row)
    return await closed_loop(client, workload.request, args.concurrency or 1, limits, WallClock(), on_row)


def _load_text(args: argparse.Namespace) -> str:
    if args.rate is not None:
        return f"open loop, {args.rate:g} requests/s"
    return f"closed loop, {args.concurrency or 1} at a time"


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """The flags, without the token."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "token"
    }
