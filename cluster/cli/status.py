"""`baton status`: what the pools and workers are doing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from cluster.api import ModelInfo, WorkerStatus
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client.client import BatonClient

_EPILOG = """\
run, wait, swapped: sequences in the batch, waiting for blocks or their KV cache, in host memory for lack of blocks.
free, reserved and quarantined are KV blocks: what can be allocated, what is set aside for handoffs under way, and what
a lost worker might still write to. --json has every field, with the workers' full names.
"""
_COLORS = {"ready": "green", "starting": "yellow", "stalled": "red", "draining": "yellow", "lost": "red"}
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
        server = client.server_info(_TIMEOUT_S)
        ready, reason = client.health(timeout_s=_TIMEOUT_S)
    if args.json:
        health = {"ready": ready, "reason": reason}
        listed = [asdict(worker) for worker in workers]
        whole = {"server": asdict(server), "model": asdict(model), "health": health, "workers": listed}
        print(json.dumps(whole, indent=2))
    else:
        if reason or not ready:
            print(f"{'ready' if ready else 'not ready'}: {reason or 'no reason given'}")
        built = f" (commit {server.commit})" if server.commit else ""
        print(f"baton {server.version}{built}, up for {readable_time(server.uptime_s)}")
        _print_tables(model, workers)
    return 0


def readable_time(seconds: float) -> str:
    """Such as 42 s, 5 min 10 s, 3 h 2 min, 12 d 4 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def _print_tables(model: ModelInfo, workers: Sequence[WorkerStatus]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{escape(model.name)}[/]  {model.architecture}, {model.dtype}, context {model.max_model_len} tokens"
    )
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("worker", "state", "runs on"):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait", "swap-\nped", "blocks\nfree", "\nof", "re-\nserved", "quaran-\ntined"):
        table.add_column(name, justify="right", no_wrap=True)
    for w in workers:
        load = w.load
        numbers = (
            load.running, load.waiting, load.preempted, load.free_blocks, load.total_blocks, load.reserved_blocks,
            load.quarantined_blocks,
        )  # fmt: skip
        state = f"[{_COLORS.get(w.state, 'default')}]{escape(w.state)}[/]"
        runs_on = f"{w.device} {w.attention_backend}"
        table.add_row(escape(w.engine_id.partition(".")[0]), state, escape(runs_on), *map(str, numbers))
    console.print(table)
    for role in ("prefill", "decode"):
        pool = [w for w in workers if w.role == role]
        console.print(f"{role} pool: {_summary(pool)}")
        for group in dict.fromkeys(w.group for w in pool if w.group):
            console.print(f"  {group}: {_summary([w for w in pool if w.group == group])}")


def _summary(workers: Sequence[WorkerStatus]) -> str:
    if not workers:
        return "no workers"
    ready = sum(w.state == "ready" for w in workers)
    free, total = sum(w.load.free_blocks for w in workers), sum(w.load.total_blocks for w in workers)
    tokens = sum(w.load.waiting_tokens for w in workers)
    return f"{ready} of {len(workers)} workers ready, {free} of {total} blocks free, {tokens} prompt tokens waiting"
