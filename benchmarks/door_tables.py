"""The table of what each door costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import table

Result = Mapping[str, Any]


def doors(result: Result) -> str:
    """Processor time for a token, by both doors."""
    header = ("streams", "answers of", "gRPC, µs a token", "HTTP, µs a token", "tokens a message, gRPC", "HTTP")
    rows = []
    for point in result["points"]:
        together = {
            door: sum(run["tokens"] for run in runs) / sum(run["messages"] for run in runs)
            for door, runs in point["runs"].items()
        }
        rows.append(
            (
                f"{point['streams']}",
                f"{point['length']} tokens",
                f"{point['cpu_us_per_token']['grpc']:.0f}",
                f"{point['cpu_us_per_token']['http']:.0f}",
                f"{together['grpc']:.1f}",
                f"{together['http']:.1f}",
            )
        )
    return table(header, rows, num_text_columns=2)


TABLES: Mapping[str, Callable[[Result], str]] = {"doors": doors}
"""Name of a table, and of its result file, to what makes it."""
