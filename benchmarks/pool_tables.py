"""The tables of docs/benchmarks.md about splits of GPUs: goodput of each beside the plan, and where two lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import provenance, read_result, table

_NONE = "No result is kept yet."
_DASH = "—"
_SIDES = {"always": "1P1D", "never": "2 × both", "auto": "1P1D, auto"}
_LOSING_FILES = ("gpu_losing_case.json", "gpu_losing_case_tight.json")
_LOSING_HEADER = (*_SIDES.values(), "1P1D / both")
_TRIED_HEADER = ("", "rate/s", "met", "TTFT p90, ms", "TPOT p90, ms", "gateway, cores")


def pool_ratio(results: Path) -> str:
    """Each workload on each split: planned, measured, and what the planner recommends."""
    path = results / "gpu_pool_ratio.json"
    if not path.exists():
        return _NONE
    result = read_result(path)
    rows = [row for asked in result["workloads"] for row in _rows_of(asked, result["splits"])]
    header = (
        "workload", "split", "planned goodput/s", "measured goodput/s", "planned / measured", "TTFT p90, ms",
        "TPOT p90, ms", "gateway, cores", "planned to be bound by", "best", "recommended",
    )  # fmt: skip
    matches = [_match(asked["name"], result["splits"]) for asked in result["workloads"]]
    told = f"The planner's recommendation is the best split for {sum(matches)} of {len(matches)} workloads."
    return f"{table(header, rows, num_text_columns=2)}\n\n{told}\n\n{_where(result)}"


def losing_case(results: Path) -> str:
    """The same requests on 1P1D, on two workers that do both, and on 1P1D that chooses, for each kept objective."""
    paths = [results / name for name in _LOSING_FILES if (results / name).exists()]
    return "\n\n".join(_losing_case(read_result(path)) for path in paths) or _NONE


def _losing_case(result: Mapping[str, Any]) -> str:
    sides = {side["disaggregation"]: side for side in result["sides"]}
    pair, mixed, auto = (sides.get(name, {}) for name in ("always", "never", "auto"))
    low, asked = result["low"], result["asked"]
    tables = []
    if low is not None:
        rows = [
            (f"{name} {percentile}, ms", *_compared(pair, mixed, auto, ("low", "summary", key, percentile), 1e3))
            for name, key in (("TTFT", "ttft"), ("ITL", "itl"), ("request", "e2e"))
            for percentile in ("p50", "p99")
        ]
        tables.append(table((_load_text(low), *_LOSING_HEADER), rows, num_text_columns=1))
    rows = [
        ("goodput/s", *_goodputs(pair, mixed, auto)),
        ("planned goodput/s", *_compared(pair, mixed, auto, ("plan", "goodput_per_s"), 1.0)),
    ]
    tables.append(table((_asked_text(asked), *_LOSING_HEADER), rows, num_text_columns=1))
    tables.append(table(_TRIED_HEADER, _tried_rows(sides), num_text_columns=1))
    return "\n\n".join([*tables, _where(result)])


def _tried_rows(sides: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Every rate of every side, lowest first."""
    return [
        (
            _SIDES[name],
            f"{tried['rate']:.1f}",
            f"{tried['share']:.0%}",
            _p90(tried, "ttft", 0),
            _p90(tried, "tpot", 2),
            f"{tried['gateway_cores']:.2f}",
        )
        for name in _SIDES
        for tried in sorted(sides.get(name, {}).get("tried", []), key=lambda tried: float(tried["rate"]))
    ]


TABLES: Mapping[str, Callable[[Path], str]] = {"gpu_pool_ratio": pool_ratio, "gpu_losing_case": losing_case}
"""Name of a marker in the page to what makes its table from the folder of results."""


def _rows_of(asked: Mapping[str, Any], splits: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    best = _best(asked["name"], splits)
    rows = []
    for split in splits:
        here = _workload(split, asked["name"])
        if here is None or "goodput" not in here:
            rows.append((_asked_text(asked), split["split"], *[_DASH] * 9))
            continue
        plan = next(plan for plan in here["plans"] if plan["split"] == split["split"])
        rate, planned = here["goodput"]["rate"], plan["goodput_per_s"]
        borne = _borne(here)
        rows.append(
            (
                _asked_text(asked),
                split["split"],
                f"{planned:.1f}",
                _rate(here["goodput"]),
                f"{planned / rate:.2f}" if here["goodput"]["relation"] == "=" else _DASH,
                _p90(borne, "ttft", 0),
                _p90(borne, "tpot", 2),
                f"{borne['gateway_cores']:.2f}" if borne else _DASH,
                plan["bound_by"],
                "yes" if split["split"] == best else "",
                "yes" if split["split"] == _recommended(asked["name"], splits) else "",
            )
        )
    return rows


def _workload(split: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((here for here in split.get("workloads", []) if here["name"] == name), None)


def _best(name: str, splits: Sequence[Mapping[str, Any]]) -> str | None:
    rates = {
        split["split"]: here["goodput"]["rate"]
        for split in splits
        if (here := _workload(split, name)) and here.get("goodput", {}).get("relation") in ("=", "≥")
    }
    return max(rates, key=lambda split: rates[split], default=None)


def _recommended(name: str, splits: Sequence[Mapping[str, Any]]) -> str | None:
    """By what the workers of the first service had measured of themselves: nobody starts three to ask."""
    return next((here["recommended"] for split in splits if (here := _workload(split, name))), None)


def _match(name: str, splits: Sequence[Mapping[str, Any]]) -> bool:
    return _best(name, splits) is not None and _best(name, splits) == _recommended(name, splits)


def _borne(here: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The highest rate that was tried and is not above the goodput."""
    if here["goodput"]["relation"] == "<":
        return None
    below = [tried for tried in here["tried"] if tried["rate"] <= here["goodput"]["rate"]]
    return max(below, key=lambda tried: tried["rate"], default=None)


def _p90(tried: Mapping[str, Any] | None, name: str, digits: int) -> str:
    return _DASH if not tried or not tried[name] else f"{tried[name]['p90'] * 1e3:.{digits}f}"


def _rate(goodput: Mapping[str, Any]) -> str:
    relation = "" if goodput["relation"] == "=" else f"{goodput['relation']} "
    return f"**{relation}{goodput['rate']:.1f}**"


def _goodputs(pair: Mapping[str, Any], mixed: Mapping[str, Any], auto: Mapping[str, Any]) -> tuple[str, ...]:
    found = [side.get("goodput") for side in (pair, mixed, auto)]
    cells = [_DASH if goodput is None else _rate(goodput) for goodput in found]
    exact = all(goodput is not None and goodput["relation"] == "=" for goodput in found[:2])
    ratio = f"**{found[0]['rate'] / found[1]['rate']:.2f}**" if exact and found[0] and found[1] else _DASH
    return (*cells, ratio)


def _compared(
    pair: Mapping[str, Any], mixed: Mapping[str, Any], auto: Mapping[str, Any], names: Sequence[str], unit: float
) -> tuple[str, ...]:
    values = [_inside(side, names) for side in (pair, mixed, auto)]
    cells = [_DASH if value is None else f"{value * unit:.2f}" for value in values]
    ratio = f"**{values[0] / values[1]:.2f}**" if values[0] is not None and values[1] else _DASH
    return (*cells, ratio)


def _inside(content: Any, names: Sequence[str]) -> float | None:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return None if content is None else float(content)


def _asked_text(asked: Mapping[str, Any]) -> str:
    limits = asked["objective"]
    return (
        f"{asked['name']}: {asked['prompt_tokens']} in, {asked['output_tokens']} out; TTFT ≤ {limits['ttft']:g} s, "
        f"TPOT ≤ {limits['tpot'] * 1e3:g} ms"
    )


def _load_text(load: Mapping[str, Any]) -> str:
    return f"{load['prompt_tokens']} in, {load['output_tokens']} out, {load['rate']:g}/s for {load['duration_s']:g} s"


def _where(result: Mapping[str, Any]) -> str:
    config = result["config"]
    names = config["gpu_names"]
    gpus = f"On {len(config['devices'].split(','))} of {len(names)} × {names[0]}; " if names else ""
    note = f" {config['note']}" if config["note"] else ""
    return f"{gpus}{provenance(result['environment'])}{note}"
