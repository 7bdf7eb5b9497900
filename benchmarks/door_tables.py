"""The tables of the doors: what each costs, and what other tools see through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import table

Result = Mapping[str, Any]


def doors(result: Result) -> str:
    """Processor time for a message and for a token, by both doors."""
    header = ("streams", "answers of", "door", "tokens a message", "µs a message", "µs a token")
    rows = []
    for point in result["points"]:
        for door, runs in point["runs"].items():
            tokens, messages, cpu_s = (sum(run[name] for run in runs) for name in ("tokens", "messages", "cpu_s"))
            rows.append(
                (
                    f"{point['streams']}",
                    f"{point['length']} tokens",
                    {"grpc": "gRPC", "http": "HTTP"}[door],
                    f"{tokens / messages:.1f}",
                    f"{cpu_s / messages * 1e6:.0f}",
                    f"{point['cpu_us_per_token'][door]:.0f}",
                )
            )
    return table(header, rows, num_text_columns=3)


def load_tools(result: Result) -> str:
    """What each tool says of the same load."""
    header = (
        "tool",
        "by",
        "succeeded",
        "prompt tokens",
        "output tokens",
        "requests/s",
        "TTFT p50, ms",
        "whole p50, ms",
    )
    rows = [
        (
            " ".join(filter(None, (run["tool"], run["version"]))),
            "gRPC" if run["tool"].startswith("baton") else "HTTP",
            f"{run['succeeded']} of {result['config']['requests']}",
            f"{run['prompt_tokens']:.1f}",
            f"{run['output_tokens']:.1f}",
            f"{run['requests_per_s']:.2f}",
            f"{run['ttft_p50_s'] * 1e3:.0f}",
            f"{run['e2e_p50_s'] * 1e3:.0f}",
        )
        for run in result["tools"]
    ]
    return table(header, rows, num_text_columns=3)


TABLES: Mapping[str, Callable[[Result], str]] = {"doors": doors, "load_tools": load_tools}
"""Name of a table, and of its result file, to what makes it."""
