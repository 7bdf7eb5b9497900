"""`baton explain`: where a request would go, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cluster.api import Explanation
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client import BatonClient
from workers.errors import InvalidRequestError
from workers.sampling.params import SamplingParams

_EPILOG = """\
ttft and itl are predicted: from what each worker has measured of itself, the prompts that wait on the prefill worker,
and the batch of the decode worker. Of the pairs that can serve the request the one of the lowest cost, the time to the
first token and through the next ones, is chosen. Nothing is generated or reserved. Tokens that are cached on the
prefill worker are not computed again.

examples:
  baton explain "The capital of France is" --max-tokens 16
  baton explain --prompt-tokens 4000 --max-tokens 200
"""
_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Show every pair of workers with its predicted times for a request, or why it cannot serve it."
    parser.epilog = _EPILOG
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the request's prompt")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="instead of a prompt: its length in tokens")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if (args.prompt is None) == (args.prompt_tokens is None):
        raise InvalidRequestError("give either a prompt or --prompt-tokens")
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        raise InvalidRequestError(f"--prompt-tokens is {args.prompt_tokens}, it must be at least 1")
    token_ids = None if args.prompt_tokens is None else [0] * args.prompt_tokens
    with BatonClient(connection_of(args)) as client:
        explanation = client.explain(
            args.prompt, token_ids=token_ids, sampling=SamplingParams(max_tokens=args.max_tokens), timeout_s=_TIMEOUT_S
        )
    if args.json:
        print(json.dumps(asdict(explanation), indent=2))
    else:
        _print_table(explanation)
    return 0


def _print_table(explanation: Explanation) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"{explanation.prompt_tokens} prompt tokens, at most {explanation.max_tokens} to generate")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("", "prefill", "decode"):
        table.add_column(name, no_wrap=True)
    for name in ("ttft ms", "itl ms", "cost ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cached", justify="right", no_wrap=True)
    table.add_column("why not")
    for pair in explanation.pairs:
        numbers = (f"{seconds * 1e3:.1f}" for seconds in (pair.ttft_s, pair.itl_s, pair.cost_s))
        names = (escape(engine_id.partition(".")[0]) for engine_id in (pair.prefill, pair.decode))
        mark, cached = "[green]→[/]" if pair.chosen else "", str(pair.cached_tokens)
        table.add_row(mark, *names, *numbers, cached, escape(pair.refusal))
    console.print(table)
    if not any(pair.chosen for pair in explanation.pairs):
        console.print("no pair can take it now")
