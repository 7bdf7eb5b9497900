"""`baton status`: what the pools and workers are doing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from cluster.api import ModelInfo, WorkerStatus
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client import BatonClient

_EPILOG = """\
free, reserved and quarantined are KV blocks: what can be allocated, what is set aside for handoffs under way, and
what a lost worker might still write to. waiting tokens are prompt tokens that are not computed yet (prefill) or have
not arrived yet (decode).
"""
_COLORS = {"ready": "green", "starting": "yellow", "draining": "yellow", "lost": "red"}
_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Show a server's model, pools and workers: state, load, free and reserved KV blocks."
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with BatonClient(connection_of(args)) as client:
        model, workers = client.model_info(_TIMEOUT_S), client.workers(_TIMEOUT_S)
    if args.json:
        print(json.dumps({"model": asdict(model), "workers": [asdict(worker) for worker in workers]}, indent=2))
    else:
        _print_tables(model, workers)
    return 0


def _print_tables(model: ModelInfo, workers: Sequence[WorkerStatus]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{escape(model.name)}[/]  {model.architecture}, {model.dtype}, context {model.max_model_len} tokens"
    )
    table = Table("worker", "pool", "state", "device", "attention")
    for name in ("running", "waiting", "waiting tokens", "preempted"):
        table.add_column(name, justify="right")
    for name in ("block size", "blocks", "free", "reserved", "quarantined"):
        table.add_column(name, justify="right")
    for w in workers:
        state = f"[{_COLORS.get(w.state, 'default')}]{escape(w.state)}[/]"
        numbers = (
            w.load.running, w.load.waiting, w.load.waiting_tokens, w.load.preempted, w.block_size, w.load.total_blocks,
            w.load.free_blocks, w.load.reserved_blocks, w.load.quarantined_blocks,
        )  # fmt: skip
        table.add_row(escape(w.engine_id), w.role, state, w.device, w.attention_backend, *map(str, numbers))
    console.print(table)
    for role in ("prefill", "decode"):
        pool = [w for w in workers if w.role == role]
        ready = sum(w.state == "ready" for w in pool)
        free, total = sum(w.load.free_blocks for w in pool), sum(w.load.total_blocks for w in pool)
        console.print(f"{role} pool: {ready} of {len(pool)} workers ready, {free} of {total} blocks free")
