"""The tables of docs/guarantees.md: what became of a service whose parts were hurt, and what storms left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.faults.cells import PHASES, all_cells
from benchmarks.markdown import provenance, read_result, table

Result = Mapping[str, Any]
_NONE = "No result is kept yet."
_DASH = "—"
_MB = 1e6


def kill_matrix(results: Path) -> str:
    """A row a cell, then the combinations that there are not, with their reasons."""
    path = results / "kill_matrix.json"
    if not path.exists():
        return _NONE
    cells = read_result(path)["cells"]
    run = [cell for cell in cells if "not_run" not in cell]
    header = (
        "who", "how", "when", "address", "right", "wrong", "failed", "noticed after, s", "slowest answer, s",
        "well after, s", "blocks missing",
    )  # fmt: skip
    right, wrong, missing = (sum(cell[what] for cell in run) for what in ("right", "wrong", "blocks_missing"))
    totals = f"{len(run)} cells: {right} right answers, {wrong} wrong ones, {missing} blocks missing."
    parts = [totals, table(header, [_cell_row(cell) for cell in run], num_text_columns=4)]
    known = {cell["cell"] for cell in cells}
    yet = [
        {"cell": cell.name, "not_run": cell.not_run or "yet to be run"}
        for cell in all_cells()
        if cell.name not in known
    ]
    if reasons := _not_run([*(cell for cell in cells if "not_run" in cell), *yet]):
        parts.append(reasons)
    return "\n\n".join([*parts, _when(run)])


def _cell_row(cell: Result) -> tuple[str, ...]:
    target, harm, phase, address = cell["cell"].split("/")
    return (
        target,
        harm,
        phase,
        address,
        str(cell["right"]),
        str(cell["wrong"]),
        _by_status(cell["failed"]),
        _seconds(cell["noticed_s"], 2),
        _seconds(cell["slowest_s"], 1),
        _seconds(cell["recovered_s"], 1),
        str(cell["blocks_missing"]),
    )


def _not_run(cells: Iterable[Result]) -> str:
    """A line a reason; where there is a reason for all three moments, none is named."""
    by_reason: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    for cell in cells:
        target, harm, phase, address = cell["cell"].split("/")
        by_reason.setdefault(cell["not_run"], {}).setdefault((target, harm, address), []).append(phase)
    lines = []
    for reason, found in by_reason.items():
        names = [
            f"{target} {harm}, {address} address" + ("" if len(phases) == len(PHASES) else f" ({', '.join(phases)})")
            for (target, harm, address), phases in found.items()
        ]
        lines.append(f"- Not run: {'; '.join(names)}: {reason}.")
    return "\n".join(lines)


def storms(results: Path) -> str:
    """What each storm asked and got, then what the service held before and after it."""
    path = results / "storms.json"
    if not path.exists():
        return _NONE
    told = read_result(path)["storms"]
    asked = ("storm", "right", "wrong", "failed", "left", "answer p50, s", "p99", "longest", "idle again after, s")
    kept = ("storm", "process", "MB before", "after", "descriptors before", "after", "threads before", "after")
    books = ("storm", "blocks missing", "calls, queue, attempts, bookings", "tenants' accounts", "objects more by type")
    return "\n\n".join(
        [
            table(asked, [_storm_row(storm) for storm in told], num_text_columns=1),
            table(kept, [row for storm in told for row in _held_rows(storm)], num_text_columns=2),
            table(books, [_books_row(storm) for storm in told], num_text_columns=1),
            _when(told),
        ]
    )


def _storm_row(storm: Result) -> tuple[str, ...]:
    seconds = storm["seconds"] or {}
    return (
        _what(storm),
        str(storm["right"]),
        str(storm["wrong"]),
        _by_status(storm["failed"]),
        _by_status(storm["left"]),
        *(_seconds(seconds.get(name), 2) for name in ("p50", "p99", "max")),
        _seconds(max(storm["idle_s"]), 1),
    )


def _what(storm: Result) -> str:
    match storm["storm"]:
        case "abort":
            return f"{storm['clients']} clients leave at once, {storm['rounds']} times"
        case "burst":
            return f"{storm['calls']} unary calls at once"
        case "overload":
            times = storm["offered_per_s"] / storm["saturating_per_s"]
            return f"{times:g} × saturation ({storm['saturating_per_s']:.0f}/s) for {_lasted(storm):.0f} s"
        case name:
            return f"{name} of {_lasted(storm):.0f} s at {storm['offered_per_s']:.0f}/s"


def _lasted(storm: Result) -> float:
    """Seconds of a load of so many requests a second."""
    return float(storm["sent"] / storm["offered_per_s"])


def _held_rows(storm: Result) -> list[tuple[str, ...]]:
    before, after = storm["before"]["processes"], storm["after"]["processes"]
    return [
        (
            storm["storm"],
            name,
            f"{before[name]['rss'] / _MB:.0f}",
            f"{after[name]['rss'] / _MB:.0f}",
            *(str(held[name][what]) for what in ("descriptors", "threads") for held in (before, after)),
        )
        for name in before
        if name in after
    ]


def _books_row(storm: Result) -> tuple[str, ...]:
    before, after = (storm[when]["books"] for when in ("before", "after"))
    empty = ("calls", "queued", "attempts", "booked_requests", "booked_blocks")
    grown = ", ".join(f"{count} {kind.rpartition('.')[2]}" for kind, count in sorted(storm["grown"].items()))
    return (
        storm["storm"],
        str(storm["after"]["blocks_missing"]),
        str(sum(after[name] for name in empty)),
        f"{before['tenant_accounts']} → {after['tenant_accounts']}",
        grown or "none",
    )


def _by_status(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or _DASH


def _seconds(value: float | None, digits: int) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _when(results: Iterable[Result]) -> str:
    """When and with what all of these were run, which may be in parts."""
    by_run = {result["environment"]["date"]: result["environment"] for result in results}
    runs = [by_run[date] for date in sorted(by_run)]
    if not runs:
        return _NONE
    loads = [run["load_average"] for run in runs]
    commits = ", ".join(dict.fromkeys(run["commit"][:12] for run in runs))
    span = f"{len(runs)} runs from {runs[0]['date']} to {runs[-1]['date']}, commits {commits}"
    return f"{span}; load average at their starts {min(loads):g} to {max(loads):g}. The first: {provenance(runs[0])}"


TABLES: Mapping[str, Callable[[Path], str]] = {"kill_matrix": kill_matrix, "storms": storms}
"""Name of a table to what makes it."""
