"""A run as a picture: how TTFT and ITL are distributed, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Row
from workers.errors import ConfigError

_BINS = 60


def check_plotting() -> None:
    """Find out before a run whether a plot can be drawn after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'baton-llm[bench]'") from error


def write_plot(path: Path, rows: Sequence[Row], duration_s: float, title: str) -> None:
    """Draw a run into a PNG file.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    done = [row for row in rows if row.ok]
    _cdf(top_left, [row.ttft_s for row in done if row.ttft_s is not None], "time to first token")
    _cdf(top_right, [interval for row in done for interval in row.itl_s], "inter-token latency")
    _timeline(bottom_left, rows)
    _rates(bottom_right, rows, duration_s)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_png(str(path))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _cdf(axes: Any, seconds: Sequence[float], name: str) -> None:
    axes.set(xlabel=f"{name}, ms", ylabel="share of samples", ylim=(0, 1.02), title=f"{name} (CDF)")
    axes.grid(alpha=0.3)
    if not seconds:
        return
    milliseconds = np.sort(np.asarray(seconds)) * 1e3
    axes.step(milliseconds, np.arange(1, len(milliseconds) + 1) / len(milliseconds), where="post")
    for percentile, style in ((50, ":"), (99, "--")):
        value = float(np.percentile(milliseconds, percentile))
        axes.axvline(value, linestyle=style, color="grey", label=f"p{percentile} {value:.1f} ms")
    axes.legend(loc="lower right")


def _timeline(axes: Any, rows: Sequence[Row]) -> None:
    """One line a request: waiting for its first token, then receiving; a cross where it failed."""
    axes.set(xlabel="seconds", ylabel="request", title="requests over time")
    done = [row for row in rows if row.ok and row.first_token_s is not None]
    failed = [row for row in rows if not row.ok]
    first = [row.first_token_s for row in done]
    axes.hlines(
        [r.index for r in done], [r.scheduled_s for r in done], first, color="tab:orange", label="to first token"
    )
    axes.hlines([r.index for r in done], first, [r.ended_s for r in done], color="tab:blue", label="tokens")
    if failed:
        axes.plot([r.ended_s for r in failed], [r.index for r in failed], "x", color="tab:red", label="failed")
    axes.invert_yaxis()
    if rows:
        axes.legend(loc="best")


def _rates(axes: Any, rows: Sequence[Row], duration_s: float) -> None:
    """Output tokens per second, and requests under way, over time."""
    axes.set(xlabel="seconds", ylabel="output tokens/s", title="throughput and requests under way")
    edges = np.linspace(0.0, max(duration_s, 1e-3), _BINS + 1)
    times = [at for row in rows for at in _token_times(row)]
    counts, _ = np.histogram(times, edges)
    axes.stairs(counts / (edges[1] - edges[0]), edges, fill=True, alpha=0.4)
    under_way = axes.twinx()
    under_way.set_ylabel("requests under way")
    events = sorted([(row.scheduled_s, 1) for row in rows] + [(row.ended_s, -1) for row in rows])
    under_way.step([at for at, _ in events], np.cumsum([change for _, change in events]), where="post", color="black")


def _token_times(row: Row) -> list[float]:
    if row.first_token_s is None:
        return []
    return [row.first_token_s, *(row.first_token_s + np.cumsum(row.itl_s)).tolist()]
