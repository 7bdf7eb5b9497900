"""`baton explain`: where a request would go, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cluster.api import Explanation
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client.client import BatonClient
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams

_EPILOG = """\
All times are predicted: from what each worker has measured of itself and of the way to the other, the prompts that
wait on it, and the sequences and tokens that the decode worker has. Of those that can serve the request the one of the
lowest cost is chosen: the time to the first token (ttft), of the handoff as far as prefill does not hide it, through
the next tokens (itl), and, where a prompt is computed on its decode worker, that by which it holds up the others there.
Nothing is generated or reserved. Tokens in the prefix cache are not computed again, those of the decode worker's
("there") not moved.

examples:
  baton explain "The capital of France is" --max-tokens 16
  baton explain --prompt-tokens 4000 --max-tokens 200
"""
_TIMEOUT_S = 10.0
_ON_DECODE = "on the decode worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Show every choice of workers with its predicted times for a request, or why it cannot serve it."
    )
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
    for name in ("ttft ms", "handoff", "itl", "others", "cost", "cached", "there"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why not")
    for pair in explanation.pairs:
        times = (pair.ttft_s, pair.handoff_s, pair.itl_s, pair.others_s, pair.cost_s)
        numbers = (f"{seconds * 1e3:.1f}" for seconds in times)
        cached = (str(pair.cached_tokens), str(pair.decode_cached_tokens))
        prefill = _ON_DECODE if pair.prefill is None else _short(pair.prefill)
        mark = "[green]→[/]" if pair.chosen else ""
        table.add_row(mark, escape(prefill), escape(_short(pair.decode)), *numbers, *cached, escape(pair.refusal))
    console.print(table)
    if not any(pair.chosen for pair in explanation.pairs):
        console.print("nobody can take it now")


def _short(engine_id: str) -> str:
    return engine_id.partition(".")[0]
