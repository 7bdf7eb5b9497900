"""Which pair of workers serves a request: filter by what they can do, then score by measured cost and load.

Plain data in, plain data out; knows neither Ray nor requests under way. Costs are predictions from each worker's own
measurements; there is no table of hardware here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.routing.output_lengths import Outlook, likely_peak
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.worker_table import WorkerTable
from workers.block_manager import blocks_for

_LOOK_AHEAD_TOKENS = 64
"""Decode steps that a placement is judged by: about as long as today's load is likely to last."""

_Floats = npt.NDArray[np.float64]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Demand:
    """What a request needs.

    Attributes:
        prompt_tokens: length of its prompt.
        max_tokens: the most tokens to generate.
        outlook: how many it is likely to generate; None: its growth, and that of the others, is not looked at.
        max_queued_s: a prefill worker that has more to do takes nothing now.
        prefix: its prompt, as prefix caches are asked for it; None: they are not.
    """

    prompt_tokens: int
    max_tokens: int
    outlook: Outlook | None = None
    max_queued_s: float = math.inf
    prefix: PromptPrefix | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Bar:
    """Why two workers cannot work together; `forever`: waiting does not help."""

    reason: str
    forever: bool


Bars = Mapping[tuple[str, str], Bar]
"""By (prefill, decode)."""


@dataclass(frozen=True)
class Placement:
    """A chosen pair.

    Attributes:
        prefill: engine id.
        decode: engine id.
        ttft_s: predicted seconds until the first token.
        itl_s: predicted seconds between tokens, as the decode worker's batch is now.
        cached_tokens: of the prompt, that the prefill worker has in its cache.
    """

    prefill: str
    decode: str
    ttft_s: float
    itl_s: float
    cached_tokens: int = 0


@dataclass(frozen=True)
class NoPlacement:
    """No pair can take the request now; `explain` says why. `hopeless`: none could, even if all were idle and ready."""

    hopeless: bool


@dataclass(frozen=True)
class PairReport:
    """A pair as the router saw it for one request.

    Attributes:
        prefill: engine id.
        decode: engine id.
        ttft_s: predicted seconds until the first token.
        itl_s: predicted seconds between tokens.
        cost_s: predicted seconds to the first token and through the next ones: the lowest is chosen.
        refusal: why it cannot serve the request now; empty if it can.
        chosen: whether it is the one.
        cached_tokens: of the prompt, that the prefill worker has in its cache.
    """

    prefill: str
    decode: str
    ttft_s: float
    itl_s: float
    cost_s: float
    refusal: str
    chosen: bool
    cached_tokens: int = 0


Choose = Callable[[Demand, WorkerTable, WorkerTable, Bars], Placement | NoPlacement]
"""How a pair is chosen from (demand, prefill pool, decode pool, bars): `place`, or another policy to compare with."""


def place(demand: Demand, prefill: WorkerTable, decode: WorkerTable, bars: Bars) -> Placement | NoPlacement:
    """Choose the pair that is predicted to answer soonest; of equals the one with the fewest requests.

    The cost of a pair is the time until the first token (the prompts queued on the prefill worker, and what it has not
    cached of this one) plus
    the time of the next decode steps with one sequence more in the decode worker's batch.

    Args:
        demand: what the request needs.
        prefill: the prefill pool.
        decode: the decode pool.
        bars: pairs that cannot work together.
    """
    p_fits = fits(prefill, demand) & takes_more(prefill, demand)
    d_fits = fits(decode, demand) & has_room(decode, demand)
    cached = _cached(prefill, demand)
    p_cost = np.where(p_fits, _ttft(prefill, demand, cached), np.inf)
    d_cost = np.where(d_fits, decode.column("step_s") * _steps(demand), np.inf)
    if not (p_fits.any() and d_fits.any()):
        return NoPlacement(is_hopeless(demand, prefill, decode, bars))
    p, d = _least(p_cost, prefill.column("running")), _least(d_cost, decode.column("running"))
    if bars and (prefill.engine_ids[p], decode.engine_ids[d]) in bars:
        pairs = p_cost[:, None] + d_cost
        for row, column in _barred_cells(bars, prefill, decode):
            pairs[row, column] = np.inf
        if not np.isfinite(pairs).any():
            return NoPlacement(is_hopeless(demand, prefill, decode, bars))
        running = prefill.column("running")[:, None] + decode.column("running")
        p, d = divmod(_least(pairs.ravel(), running.ravel()), len(decode))
    itl_s = float(decode.column("step_s")[d])
    return Placement(prefill.engine_ids[p], decode.engine_ids[d], float(p_cost[p]), itl_s, int(cached[p]))


def explain(demand: Demand, prefill: WorkerTable, decode: WorkerTable, bars: Bars) -> list[PairReport]:
    """Every pair, those that can serve the request first, best first; see `place`."""
    placement = place(demand, prefill, decode, bars)
    chosen = (placement.prefill, placement.decode) if isinstance(placement, Placement) else None
    cached, step_s = _cached(prefill, demand), decode.column("step_s")
    ttft = _ttft(prefill, demand, cached)
    reports = []
    for p, p_id in enumerate(prefill.engine_ids):
        for d, d_id in enumerate(decode.engine_ids):
            bar = bars.get((p_id, d_id))
            refusal = (
                _unfit(prefill, p, demand)
                or _busy(prefill, p, demand)
                or (bar and f"{p_id} -> {d_id}: {bar.reason}")
                or _unfit(decode, d, demand)
                or _no_room(decode, d, demand)
            )
            cost = float(ttft[p] + step_s[d] * _steps(demand))
            is_chosen = (p_id, d_id) == chosen
            ttft_s, itl_s, held = float(ttft[p]), float(step_s[d]), int(cached[p])
            reports.append(PairReport(p_id, d_id, ttft_s, itl_s, cost, refusal, is_chosen, held))
    return sorted(reports, key=lambda r: (bool(r.refusal), not r.chosen, r.cost_s, r.prefill, r.decode))


def refusals(demand: Demand, prefill: WorkerTable, decode: WorkerTable, bars: Bars) -> tuple[str, ...]:
    """Why no pair can take the request now, each reason once."""
    reports = explain(demand, prefill, decode, bars)
    return tuple(dict.fromkeys(report.refusal for report in reports if report.refusal)) or ("there are no workers",)


def _cached(prefill: WorkerTable, demand: Demand) -> npt.NDArray[np.int64]:
    if demand.prefix is None:
        return np.zeros(len(prefill), dtype=np.int64)
    return prefill.cached_tokens(demand.prefix)


def _ttft(prefill: WorkerTable, demand: Demand, cached: npt.NDArray[np.int64]) -> _Floats:
    seconds: _Floats = prefill.column("queued_s") + prefill.missing_seconds(demand.prompt_tokens, cached)
    return seconds


def _steps(demand: Demand) -> int:
    return min(demand.max_tokens, _LOOK_AHEAD_TOKENS)


def _could(table: WorkerTable, demand: Demand) -> _Flags:
    """Who could take the request if it were idle and ready."""
    needed = demand.prompt_tokens + 1
    could: _Flags = (table.column("max_model_len") >= needed) & (
        table.column("total_blocks") * table.column("block_size") >= needed
    )
    return could


def fits(table: WorkerTable, demand: Demand) -> _Flags:
    """Who can take the request, as far as its length goes, and is ready."""
    fitting: _Flags = _could(table, demand) & table.column("ready")
    return fitting


def has_room(table: WorkerTable, demand: Demand) -> _Flags:
    """Whose cache and batch have room for the prompt and its first token now, and for everybody's growth."""
    room = table.column("free_blocks") * table.column("block_size")
    roomy: _Flags = (room >= demand.prompt_tokens + 1) & (table.column("free_slots") > 0)
    if demand.outlook is not None and len(table):
        roomy &= (table.column("running") == 0) | (_peak_tokens(table, demand, demand.outlook) <= _capacity(table))
    return roomy


def takes_more(table: WorkerTable, demand: Demand) -> _Flags:
    """Which prefill workers are not too busy to be given a prompt now."""
    free: _Flags = table.column("queued_s") <= demand.max_queued_s
    return free


def _capacity(table: WorkerTable) -> npt.NDArray[np.int64]:
    tokens: npt.NDArray[np.int64] = table.column("usable_blocks") * table.column("block_size")
    return tokens


def _peak_tokens(table: WorkerTable, demand: Demand, outlook: Outlook) -> _Floats:
    """The most that each worker's requests and this one are likely to hold at any time to come.

    A worker with nothing to do takes a request whatever this says: waiting would not make it smaller.
    """
    peaks: _Floats = table.column("peak_tokens") + likely_peak(outlook.held(demand.prompt_tokens))
    return peaks


def _least(cost: _Floats, running: npt.NDArray[Any]) -> int:
    """The lowest cost; of equals the one with the fewest requests."""
    equals = np.flatnonzero(cost <= cost.min() * (1.0 + 1e-9))
    return int(equals[running[equals].argmin()])


def _barred_cells(bars: Bars, prefill: WorkerTable, decode: WorkerTable) -> Iterator[tuple[int, int]]:
    for p_id, d_id in bars:
        row, column = prefill.row(p_id), decode.row(d_id)
        if row is not None and column is not None:
            yield row, column


def is_hopeless(demand: Demand, prefill: WorkerTable, decode: WorkerTable, bars: Bars) -> bool:
    """Whether no pair could take the request, even if all were idle and ready. An empty pool may yet fill."""
    if not len(prefill) or not len(decode):
        return False
    possible = np.logical_and.outer(_could(prefill, demand), _could(decode, demand))
    forever = {pair: bar for pair, bar in bars.items() if bar.forever}
    for row, column in _barred_cells(forever, prefill, decode):
        possible[row, column] = False
    return not possible.any()


def _unfit(table: WorkerTable, row: int, demand: Demand) -> str:
    """Why a worker cannot take the prompt, in words; empty if it can."""
    name, needed = table.engine_ids[row], _blocks(table, row, demand)
    window, blocks = table.column("max_model_len")[row], table.column("total_blocks")[row]
    if demand.prompt_tokens + 1 > window:
        return f"{name}: {demand.prompt_tokens} prompt tokens, context window {window}"
    if needed > blocks:
        return f"{name}: {needed} blocks needed, {blocks} in all"
    if not table.column("ready")[row]:
        return f"{name}: not ready"
    return ""


def _no_room(table: WorkerTable, row: int, demand: Demand) -> str:
    """Why a decode worker has no room for the request now, in words; empty if it has."""
    name, needed, free = table.engine_ids[row], _blocks(table, row, demand), table.column("free_blocks")[row]
    if table.column("free_slots")[row] < 1:
        return f"{name}: its batch is full"
    if needed > free:
        return f"{name}: {needed} blocks needed, {free} free"
    if demand.outlook is not None and not has_room(table, demand)[row]:
        peak = _peak_tokens(table, demand, demand.outlook)[row]
        return f"{name}: its requests would grow to about {peak:.0f} tokens, {_capacity(table)[row]} fit"
    return ""


def _busy(table: WorkerTable, row: int, demand: Demand) -> str:
    """Why a prefill worker takes nothing now, in words; empty if it does."""
    if (queued_s := table.column("queued_s")[row]) > demand.max_queued_s:
        return f"{table.engine_ids[row]}: {queued_s:.3g} s of work before it, {demand.max_queued_s:.3g} s allowed"
    return ""


def _blocks(table: WorkerTable, row: int, demand: Demand) -> int:
    return blocks_for(demand.prompt_tokens + 1, int(table.column("block_size")[row]))
