"""A run as a table on the terminal and as a JSON file with everything that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import Environment
from benchmarks.measure import Row
from benchmarks.metrics import Percentiles, Summary
from cluster.api import ModelInfo
from workers.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1
_LATENCIES = (
    ("ttft", "TTFT"),
    ("itl", "ITL"),
    ("tpot", "TPOT"),
    ("e2e", "E2E"),
    ("longest_gap", "longest gap"),
    ("queue", "queue"),
    ("handoff", "handoff (exposed)"),
    ("sent_late", "sent late by"),
)


def to_json(
    kind: str, environment: Environment, config: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result file of any benchmark holds: its kind, where and how it was measured, and the results."""
    return {
        "kind": kind,
        "schema": SCHEMA_VERSION,
        "environment": environment.to_json(),
        "config": dict(config),
        **results,
    }


def run_to_json(
    environment: Environment, config: Mapping[str, Any], model: ModelInfo, summary: Summary, rows: Sequence[Row]
) -> dict[str, Any]:
    """A run of `baton bench`, one entry of "requests" for each request that was sent."""
    requests = [{**asdict(row), "ttft_s": row.ttft_s, "tpot_s": row.tpot_s, "e2e_s": row.e2e_s} for row in rows]
    return to_json(
        "bench", environment, config, {"model": asdict(model), "summary": asdict(summary), "requests": requests}
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def print_summary(console: Console, summary: Summary, rows: Sequence[Row]) -> None:
    """The run's numbers, latencies in milliseconds."""
    from rich.table import Table

    table = Table("milliseconds", title="Latency of the requests that succeeded", title_justify="left")
    for name in ("mean", "p50", "p90", "p95", "p99", "max", "samples"):
        table.add_column(name, justify="right")
    for name, label in _LATENCIES:
        values: Percentiles | None = getattr(summary, name)
        if values is None:
            table.add_row(label, *["–"] * 6, "0")
        else:
            seconds = (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
            table.add_row(label, *(f"{second * 1e3:.2f}" for second in seconds), str(values.count))
    console.print(table)
    console.print(
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tokens/s, "
        f"{summary.prompt_tokens_per_s:.1f} prompt tokens/s over {summary.duration_s:.1f} s"
    )
    if summary.goodput is not None:
        good = summary.goodput
        limits = ", ".join(f"{k} ≤ {v * 1e3:g} ms" for k, v in asdict(good.objective).items() if v is not None)
        console.print(f"goodput {good.requests_per_s:.2f} requests/s, {good.fraction:.1%} of all requests ({limits})")
    if summary.correct_fraction is not None:
        console.print(f"{summary.correct_fraction:.1%} of the answers are right")
    _print_statuses(console, summary, rows)


def _print_statuses(console: Console, summary: Summary, rows: Sequence[Row]) -> None:
    console.print(f"{summary.requests} requests: " + ", ".join(f"{n} {s}" for s, n in summary.by_status.items()))
    for status in summary.by_status:
        error = next((row.error for row in rows if row.status == status and row.error), None)
        if error is not None:
            console.print(f"  first {status}: {error}", style="red", markup=False)
