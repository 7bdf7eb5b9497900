"""`baton plan`: how many prefill and decode workers serve a workload best, and why."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.api import WorkerStatus
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client.client import BatonClient
from cluster.planning.measured import fleet_of, read_workers
from cluster.planning.plans import Plan, plan_split, recommend, splits_of
from cluster.planning.terms import Lengths, Objective, Split, Workload
from workers.errors import InvalidRequestError

_EPILOG = """\
Predicted from what workers have measured of themselves: those of a running service, or of one whose
`baton status --json` was kept in a file. Nothing is generated. Goodput is the highest rate at which the share of
requests meets both objectives; past the saturating rate, queues grow without end.

examples:
  baton plan --gpus 4 --prompt-tokens 4000 --output-tokens 100 --ttft-ms 1000 --itl-ms 15
  baton plan --gpus 8 --prompt-tokens 200,700,1500,6000 --output-tokens 300 --ttft-ms 500 --itl-ms 10 --rate 20
  baton status --json > workers.json; baton plan --workers workers.json --gpus 4 --prompt-tokens 1000 \\
      --output-tokens 300 --ttft-ms 500 --itl-ms 8
"""
_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Weigh every split of GPUs into prefill and decode workers for a workload."
    parser.epilog = _EPILOG
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="to split up")
    for name, what in (("prompt", "prompts"), ("output", "answers")):
        parser.add_argument(
            f"--{name}-tokens",
            type=_lengths,
            required=True,
            metavar="N[,N…]",
            help=f"lengths of {what}, each as likely",
        )
    parser.add_argument("--ttft-ms", type=float, required=True, metavar="MS", help="objective: time to first token")
    parser.add_argument("--itl-ms", type=float, required=True, metavar="MS", help="objective: time between tokens")
    parser.add_argument(
        "--share", type=float, default=0.9, metavar="X", help="of requests that must meet both (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests a second; default: as many as a split can bear"
    )
    parser.add_argument(
        "--workers", type=Path, metavar="FILE", help="kept `baton status --json`; default: ask --server"
    )
    parser.add_argument(
        "--prefill-gpus", type=int, default=1, metavar="N", help="that a prefill worker takes (default: 1)"
    )
    parser.add_argument(
        "--decode-gpus", type=int, default=1, metavar="N", help="that a decode worker takes (default: 1)"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=0, metavar="N",
        help="of the prefill pool: waiting prompts share a step up to this; default: each is computed by itself",
    )  # fmt: skip
    parser.add_argument("--mixed", action="store_true", help="weigh workers that do both as well, one on each GPU")
    parser.add_argument("--overhead-ms", type=float, default=0.0, metavar="MS", help="added to every first token")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.rate is not None and not args.rate > 0:
        raise InvalidRequestError(f"--rate is {args.rate:g}, it must be more than 0")
    workload = Workload(args.prompt_tokens, args.output_tokens)
    objective = Objective(args.ttft_ms / 1e3, args.itl_ms / 1e3, args.share)
    splits = splits_of(args.gpus, args.prefill_gpus, args.decode_gpus)
    splits += [Split(0, args.gpus // args.decode_gpus)] if args.mixed else []
    fleet = fleet_of(
        _workers(args),
        max_num_batched_tokens=args.max_num_batched_tokens,
        overhead_s=args.overhead_ms / 1e3,
        tokens=round(workload.prompt.mean),
    )
    plans = [plan_split(fleet, split, workload, objective, args.rate) for split in splits]
    best = recommend(plans)
    if args.json:
        entries = [{**asdict(plan), "split": str(plan.split)} for plan in plans]
        print(json.dumps(_finite({"recommended": str(best.split), "plans": entries}), indent=2))
    else:
        _print_table(plans, best, objective, args.rate)
    return 0


def why(plan: Plan, objective: Objective, rate: float | None = None) -> str:
    """What keeps a split from more, in a sentence."""
    if plan.goodput_per_s <= 0:
        late = "first token" if plan.bound_by == "prefill" else "decode step"
        return f"even a request alone misses its objective: the {late} takes too long"
    if plan.bound_by == "prefill":
        limit = f"meet {objective.ttft_s * 1e3:g} ms to the first token"
    else:
        limit = f"meet {objective.itl_s * 1e3:g} ms between tokens and find a place in a batch"
    first = f"at {plan.goodput_per_s:.3g}/s {objective.share:.0%} just {limit}: {plan.bound_by} bounds it"
    return first if rate is None or rate <= plan.goodput_per_s else f"{first}; {rate:g}/s is too much"


def _workers(args: argparse.Namespace) -> list[WorkerStatus]:
    if args.workers is not None:
        return read_workers(args.workers)
    with BatonClient(connection_of(args)) as client:
        return client.workers(_TIMEOUT_S)


def _lengths(text: str) -> Lengths:
    try:
        return Lengths(tuple(int(part) for part in text.split(",")))
    except (ValueError, InvalidRequestError):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers from 1 on, separated by commas") from None


def _finite(value: Any) -> Any:
    """The same with null for what is infinite, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _ms(seconds: float, digits: int) -> str:
    return "∞" if math.isinf(seconds) else f"{seconds * 1e3:.{digits}f}"


def _print_table(plans: Sequence[Plan], best: Plan, objective: Objective, rate: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    asked = "at its goodput" if rate is None else f"at {rate:g} requests/s"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", title=f"Every split, {asked}")
    table.title_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column("split", no_wrap=True)
    share = f"{objective.share * 100:g}"
    numbers = (
        "good-\nput/s", "satu-\nrated/s", "prefill\nbusy", "ttft ms\nmean", f"ttft ms\np{share}", "decode\nbatch",
        "itl ms\nmean", "met",
    )  # fmt: skip
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("saturates\nfirst", no_wrap=True)
    for plan in plans:
        p, d = plan.at.prefill, plan.at.decode
        cells = (
            f"{plan.goodput_per_s:.2f}", f"{plan.saturated_per_s:.2f}", f"{p.busy:.0%}", _ms(p.ttft_mean_s, 1),
            _ms(p.ttft_s, 1), f"{d.batch:.1f}", _ms(d.itl_s, 2), f"{plan.at.met:.1%}",
        )  # fmt: skip
        table.add_row(
            "[green]→[/]" if plan is best and plan.goodput_per_s else "", str(plan.split), *cells, plan.saturates
        )
    console.print(table)
    what = f"{best.split.prefill} prefill and {best.split.decode} decode workers"
    if not best.split.prefill:
        what = f"{best.split.decode} workers that do both"
    console.print(what if best.goodput_per_s else "no split will do", why(best, objective, rate), sep=": ")
