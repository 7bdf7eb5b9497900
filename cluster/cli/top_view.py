"""How `baton top` looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_BLOCKS = " ▁▂▃▄▅▆▇█"
_STATES = {
    "ready": "green", "starting": "yellow", "stalled": "red", "draining": "yellow", "lost": "red", "prefill": "yellow",
    "handoff": "magenta", "decode": "cyan", "stop": "green", "length": "green", "error": "red", "abort": "dim",
    "queued": "dim",
}  # fmt: skip
_EVENTS = {"good": "green", "bad": "red", "info": "default"}


def view(live: dict[str, Any], width: int, height: int | None) -> RenderableType:
    """A service at one moment, for a terminal of this size; None: as high as it takes."""
    parts: list[RenderableType] = [_head(live), _numbers(live, width), Text(""), _workers(live, width)]
    used = 6 + len(live["workers"])
    room = 40 if height is None else max(2, height - used - 4)
    parts += [Text(""), _requests(live, width, max(2, min(14, room * 2 // 3)))]
    events = _events(live, max(1, min(6, room // 3 - 1)))
    return Group(*parts, Text(""), *events)


def _head(live: dict[str, Any]) -> Text:
    health = live["health"]
    text = Text.assemble(("baton ", "bold"), (live["model"]["name"], "bold cyan"), "  ")
    said = "ready" if health["ready"] else health["reason"] or "not ready"
    text.append(f"● {said}", "green" if health["ready"] else "red")
    text.append(f"  up {duration(live['now'] - live['started'])}", "dim")
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _numbers(live: dict[str, Any], width: int) -> Table:
    lately, series = live["lately"], live["series"]
    good = "–" if lately["good_share"] is None else f"{lately['good_share'] * 100:.0f} %"
    cells = [
        ("requests", f"{lately['requests_per_s']:.1f}/s", series["finished"]),
        ("good", good, series["good"]),
        ("first token", f"{seconds(lately['ttft_p50_s'])} / {seconds(lately['ttft_p90_s'])}", series["ttft_p50_s"]),
        ("between", seconds(lately["tpot_p50_s"]), series["tpot_p50_s"]),
        ("tokens", f"{lately['tokens_per_s']:.0f}/s", series["tokens"]),
        ("KV moved", f"{size(lately['kv_bytes_per_s'])}/s", []),
        ("under way", str(live["running"]), []),
        ("waiting", str(live["queued"]), series["queued"]),
    ]
    columns = 8 if width >= 180 else 4
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for _ in range(columns):
        table.add_column(no_wrap=True, overflow="ellipsis")
    sparks = 12 if width >= 180 else 9
    for begin in range(0, len(cells), columns):
        row = cells[begin : begin + columns]
        table.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value, _ in row))
        table.add_row(*(Text(spark(values, sparks), "cyan") for _, _, values in row))
    return table


def _workers(live: dict[str, Any], width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("worker", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("KV cache", no_wrap=True)
    wide = width >= 110
    if wide:
        for name in ("held", "quarantined", "silent"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("runs on", no_wrap=True, overflow="ellipsis")
    for worker in live["workers"]:
        load, colour = worker["load"], "yellow" if worker["role"] == "prefill" else "cyan"
        used = load["total_blocks"] - load["free_blocks"]
        share = used / load["total_blocks"] if load["total_blocks"] else 0.0
        full = round(share * 16)
        bar = Text.assemble(("█" * full, colour), ("─" * (16 - full), "dim"), f" {share * 100:3.0f} %")
        row: list[RenderableType] = [
            Text(worker["name"], colour),
            Text(worker["state"], _STATES.get(worker["state"], "")),
            str(load["running"]),
            str(load["waiting"]),
            bar,
        ]
        if wide:
            silent = "" if worker["silent_s"] is None else seconds(worker["silent_s"])
            row += [str(load["reserved_blocks"]), str(load["quarantined_blocks"]), silent]
            row.append(escape(f"{worker['device']} {worker['backend']}"))
        table.add_row(*row)
    return table


def _requests(live: dict[str, Any], width: int, rows: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", expand=width < 110)
    table.add_column("request", no_wrap=True, overflow="ellipsis", ratio=3, max_width=32)
    table.add_column("state", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column("TTFT", justify="right", no_wrap=True)
    wide = width >= 110
    if wide:
        for name in ("expected", "queue", "prefill", "exposed", "moved"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("user", no_wrap=True, overflow="ellipsis", max_width=16)
    for request in live["requests"][:rows]:
        places = [(request.get(role) or "").partition(".")[0] for role in ("prefill", "decode")]
        row: list[RenderableType] = [
            Text(request["id"]),
            Text(request["state"], _STATES.get(request["state"], "")),
            f"{request['prompt_tokens']}+{request['output_tokens']}",
            Text(" → ".join(place for place in places if place) or request["error"] or "–"),
            seconds(request.get("ttft_s")),
        ]
        if wide:
            expected = request.get("expected", {}).get("ttft_s")
            row += [seconds(expected), *(seconds(request.get(f"{name}_s")) for name in ("queue", "prefill", "exposed"))]
            row += [size(request.get("kv_bytes", 0)), Text(request["user"])]
        table.add_row(*row)
    return table


def _events(live: dict[str, Any], rows: int) -> list[Text]:
    lines = []
    for event in live["events"][-rows:]:
        ago = duration(max(0.0, live["now"] - event["at"]))
        line = Text.assemble((f"{ago:>7} ago  ", "dim"), (event["text"], _EVENTS.get(event["kind"], "")))
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    return lines


def spark(values: Sequence[float | None], width: int) -> str:
    """The last values as bars of eight heights; what is not known is a gap."""
    last = list(values)[-width:]
    most = max((value for value in last if value is not None), default=0.0)
    return "".join(" " if value is None else _BLOCKS[round(8 * value / most) if most else 0] for value in last)


def seconds(value: float | None) -> str:
    """With a unit that suits it."""
    if not value:
        return "–" if value is None else "0"
    if value < 0.9995:
        return f"{value * 1e3:.1f} ms" if value < 0.00995 else f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s"


def size(value: float) -> str:
    """Bytes with a unit that suits them, powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(value: float) -> str:
    """Roughly."""
    if value < 60:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 3600 else f"{value / 3600:.1f} h"
