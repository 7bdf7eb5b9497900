"""The tables of the doors: what each costs, and what other tools see through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import table

Result = Mapping[str, Any]
_MORE_TOKENS = 1.5
"""The goal: tokens of a processor second, as a multiple of those before."""
_MOST = {"metrics": 0.02, "traces": 0.05}
"""The goals: what looking may cost, as a share of what a token costs otherwise."""


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


def front_door(result: Result) -> str:
    """What a token costs the gateway, before and after, at so many streams."""
    header = (
        "streams",
        "µs of CPU a token, before",
        "after",
        "a message of a bare grpc.aio server",
        "tokens of a CPU second, after / before",
        "95 % bounds",
        "goal",
        "met",
        "messages a token, before",
        "after",
    )
    rows = []
    for point in result["points"]:
        cost, more, each = point["cpu_us_per_token"], point["more_tokens_per_cpu_s"], point["messages_per_token"]
        rows.append(
            (
                f"{point['streams']}",
                f"{cost['before']:.1f}",
                f"{cost['after']:.1f}",
                f"{cost['bare']:.1f}",
                f"**{more['median']:.2f}×**",
                f"{more['low']:.2f} … {more['high']:.2f}",
                f"≥ {_MORE_TOKENS:.1f}×",
                "yes" if more["median"] >= _MORE_TOKENS else "**no**",
                f"{each['before']:.2f}",
                f"{each['after']:.2f}",
            )
        )
    return table(header, rows, num_text_columns=0)


def bursts(result: Result) -> str:
    """How simultaneous calls end, before and after."""
    ends = sorted({end for each in result["bursts"].values() for end in each})
    header = (f"of {result['config']['burst']} calls at once", *ends)
    rows = [(name, *(f"{each.get(end, 0)}" for end in ends)) for name, each in result["bursts"].items()]
    return table(header, rows, num_text_columns=1)


def observing_cost(result: Result) -> str:
    """What each way to look costs, of the whole process and by the observers' own calls."""
    header = ("looked at by", "µs of CPU a token", "more than nothing", "95 % bounds", "own calls", "goal", "met")
    rows = [("nothing", f"{result['cpu_us_per_token']['nothing']:.1f}", "", "", "", "", "")]
    for way, more in result["ratio"].items():
        goal, own = _MOST.get(way), result["calls_share"].get(way)
        rows.append(
            (
                way.replace("nothing again", "nothing, once more"),
                f"{result['cpu_us_per_token'][way]:.1f}",
                f"{more['median'] - 1:+.1%}",
                f"{more['low'] - 1:+.1%} … {more['high'] - 1:+.1%}",
                "" if own is None else f"{own:.1%}",
                "" if goal is None else f"≤ {goal:.0%}",
                "" if goal is None else ("yes" if more["median"] - 1 <= goal else "**no**"),
            )
        )
    return table(header, rows, num_text_columns=1)


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
FRONT_DOOR: Mapping[str, Callable[[Result], str]] = {"front_door": front_door, "front_door_bursts": bursts}
"""All of one result."""
"""Name of a table, and of its result file, to what makes it."""
