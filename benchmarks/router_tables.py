"""The tables of the router and of the simulated service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import table

Result = Mapping[str, Any]


def router(result: Result) -> str:
    """How long a decision takes."""
    header = ("workers in each pool", "what is known", "decision, µs", "p99, µs", "requests/s with all books")
    rows = [
        (
            f"{case['workers']}",
            case["knows"],
            f"{case['decision_us']:.0f}",
            f"{case['decision_p99_us']:.0f}",
            f"{case['requests_per_s']:.0f}",
        )
        for case in result["cases"]
    ]
    return table(header, rows, num_text_columns=2)


def router_quality(result: Result) -> str:
    """Policies beside each other at each load."""
    header = (
        "load",
        "policy",
        "disaggregation",
        "TTFT mean, ms",
        "TTFT p99, ms",
        "ITL mean, ms",
        "ITL p99, ms",
        "failed",
    )
    rows = [
        (
            f"{case['load']:.0%}",
            case["policy"],
            case["disaggregation"],
            f"{case['ttft_mean_ms']:.0f}",
            f"{case['ttft_p99_ms']:.0f}",
            f"{case['itl_mean_ms']:.2f}",
            f"{case['itl_p99_ms']:.2f}",
            f"{sum(case['failures'].values())}",
        )
        for case in result["cases"]
    ]
    return table(header, rows, num_text_columns=3)


def saturation(result: Result) -> str:
    """Goodput by load, with and without a bound on the wait."""
    header = (
        "workload",
        "wait at most",
        "load",
        "offered/s",
        "goodput/s",
        "of its peak",
        "succeeded",
        "refused",
        "preempted",
        "TTFT p99, ms",
    )
    cases = result["cases"]
    rows = [
        (
            case["workload"],
            "no bound" if case["max_queue_wait_s"] is None else f"{case['max_queue_wait_s']:g} s",
            f"{case['load']:.2f} ×",
            f"{case['offered_per_s']:.1f}",
            f"{case['goodput_per_s']:.1f}",
            f"{case['goodput_per_s'] / _peak(cases, case):.0%}",
            f"{case['succeeded']} of {case['requests']}",
            f"{case['failures'].get('QueueFullError', 0)}",
            f"{case['preempted']}",
            "–" if case["ttft_p99_ms"] is None else f"{case['ttft_p99_ms']:.0f}",
        )
        for case in cases
    ]
    return table(header, rows, num_text_columns=3)


def _peak(cases: list[Result], like: Result) -> float:
    """The best goodput of the same workload under the same bound."""
    same = ("workload", "max_queue_wait_s")
    return max(float(case["goodput_per_s"]) for case in cases if all(case[key] == like[key] for key in same))


def simulation_scale(result: Result) -> str:
    """One long run."""
    config, figures = result["config"], result["result"]
    failures = ", ".join(f"{count} {name}" for name, count in figures["failures"].items()) or "none"
    rows = [
        ("workers", f"{config['workers']}"),
        ("requests", f"{config['requests']}"),
        ("succeeded", f"{figures['succeeded']}"),
        ("ended in an error", failures),
        ("lost", f"{figures['lost']}"),
        ("workers killed", f"{figures['killed']}"),
        ("times that the pools were scaled", f"{figures['scaled']}"),
        ("simulated time, s", f"{figures['simulated_s']:.0f}"),
        ("wall time, s", f"{figures['wall_s']:.0f}"),
        ("requests a second of wall time", f"{figures['requests_per_wall_s']:.0f}"),
        *((f"peak memory when {share} had come, MiB", f"{mib:.0f}") for share, mib in figures["peak_rss_mib"].items()),
    ]
    return table(("", "figure"), rows, num_text_columns=1)


TABLES: Mapping[str, Callable[[Result], str]] = {
    "router": router,
    "router_quality": router_quality,
    "saturation": saturation,
    "simulation_scale": simulation_scale,
}
"""Name of a table, and of its result file, to what makes it."""
