"""Which workers serve a request: filter by what they can do, then score by measured cost and load.

Plain data in, plain data out; knows neither Ray nor requests under way. Costs are predictions from each worker's own
measurements; there is no table of hardware here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from cluster.routing.costs import Costs
from cluster.routing.demand import Bar, Bars, Demand, NoPlacement, PairReport, Placement
from cluster.routing.pair_search import cheapest_pair
from cluster.routing.pairs import Pairs
from cluster.routing.suitability import busy, fits, has_room, is_hopeless, no_room, takes_more, unfit
from cluster.routing.worker_table import WorkerTable

__all__ = [
    "Bar",
    "Bars",
    "Choose",
    "Demand",
    "NoPlacement",
    "PairReport",
    "Pairs",
    "Placement",
    "explain",
    "place",
    "refusals",
]

_CLOSE_ENOUGH = 0.01
"""A pair is not looked for that would be better by less than this share: nothing is predicted so well."""
_EVEN_S = 1e-9
"""What a request on a worker counts for beside the cost: of equals the one with the fewest is chosen."""

_Floats = npt.NDArray[np.float64]

Choose = Callable[[Demand, WorkerTable, WorkerTable, Pairs], Placement | NoPlacement]
"""How workers are chosen from (demand, prefill pool, decode pool, pairs): `place`, or a policy to compare with."""


def place(demand: Demand, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs) -> Placement | NoPlacement:
    """Choose the workers of the lowest cost; of equals those with the fewest requests.

    What is minimised is the predicted delay that the placement causes, in seconds: the request's own, to its first
    token and through the next decode steps, and that of others whom it holds up.

    * A pair costs the prompts queued on the prefill worker, what it has not cached of this one, what that does not hide
      of moving the blocks that the decode worker lacks, and the next steps of the decode worker's batch with one
      sequence more and its tokens in the cache. Nobody else waits: who is queued before it goes first, and the decode
      worker never stops. If the decode worker still has prompts of its own to compute, the steps begin after those.
    * A decode worker alone costs the prompts queued there, what it has not cached of this one, with a step of its batch
      for each chunk, and the same next steps; no handoff. But no sequence of its batch goes on while a chunk is
      computed: that time counts once for each of them, and half of it for each that is likely to come meanwhile. So a
      short prompt, or one of which little is missing, takes no detour where the decode worker is idle; a long one does,
      and a busy worker is only stopped where the prefill workers are far behind.

    Args:
        demand: what the request needs; which of the two may be chosen at all.
        prefill: the prefill pool.
        decode: the decode pool.
        pairs: what is known of pairs of them.
    """
    costs = Costs(demand, prefill, decode, pairs)
    d_fits = fits(decode, demand) & has_room(decode, demand)
    if not d_fits.any():
        return NoPlacement(is_hopeless(demand, prefill, decode, pairs))
    pair = _best_pair(demand, prefill, decode, pairs, costs, d_fits) if demand.in_pairs else None
    alone = _best_alone(demand, decode, costs, d_fits) if demand.alone else None
    if alone is not None and (pair is None or alone[1] < pair[2]):
        d = alone[0]
        return Placement(
            None, decode.engine_ids[d], float(costs.local_ttft_s[d]), float(costs.itl_s[d]), int(costs.decode_cached[d])
        )
    if pair is None:
        return NoPlacement(is_hopeless(demand, prefill, decode, pairs))
    p, d, _ = pair
    return Placement(
        prefill.engine_ids[p],
        decode.engine_ids[d],
        float(costs.ttft_s[p]),
        float(costs.itl_s[d]),
        int(costs.cached[p]),
    )


def explain(demand: Demand, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs) -> list[PairReport]:
    """Every pair and every decode worker alone, as far as the demand allows for either; see `place`.

    Those that can serve the request come first, best first.
    """
    placement = place(demand, prefill, decode, pairs)
    chosen = (placement.prefill, placement.decode) if isinstance(placement, Placement) else None
    costs = Costs(demand, prefill, decode, pairs)
    reports: list[PairReport] = []
    if demand.in_pairs:
        reports += _pair_reports(demand, prefill, decode, pairs, costs, chosen)
    if demand.alone:
        reports += _local_reports(demand, decode, costs, chosen)
    return sorted(reports, key=lambda r: (bool(r.refusal), not r.chosen, r.cost_s, r.prefill or "", r.decode))


def refusals(demand: Demand, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs) -> tuple[str, ...]:
    """Why nobody can take the request now, each reason once."""
    reports = explain(demand, prefill, decode, pairs)
    return tuple(dict.fromkeys(report.refusal for report in reports if report.refusal)) or ("there are no workers",)


def _best_pair(
    demand: Demand,
    prefill: WorkerTable,
    decode: WorkerTable,
    pairs: Pairs,
    costs: Costs,
    d_fits: npt.NDArray[np.bool_],
) -> tuple[int, int, float] | None:
    """Rows of the cheapest pair, and its cost; None: no pair can take the request."""
    p_fits = fits(prefill, demand) & takes_more(prefill, demand)
    if not p_fits.any():
        return None
    p_cost = _among(p_fits, costs.ttft_s, prefill)
    d_cost = _among(d_fits, costs.decode_s, decode)
    if pairs.differ or decode.column("queued_s").any():
        return cheapest_pair(p_cost, d_cost + costs.least_handoff_s, costs.more_s, _CLOSE_ENOUGH)
    p, d = int(p_cost.argmin()), int(d_cost.argmin())
    return p, d, float(p_cost[p] + d_cost[d])


def _best_alone(
    demand: Demand, decode: WorkerTable, costs: Costs, d_fits: npt.NDArray[np.bool_]
) -> tuple[int, float] | None:
    """Row of the cheapest decode worker that computes the prompt itself, and its cost; None: none can."""
    able = d_fits & takes_more(decode, demand)
    if not able.any():
        return None
    cost = _among(able, costs.local_s, decode)
    d = int(cost.argmin())
    return d, float(cost[d])


def _among(able: npt.NDArray[np.bool_], cost: _Floats, table: WorkerTable) -> _Floats:
    return np.where(able, cost + table.column("running") * _EVEN_S, np.inf)


def _pair_reports(
    demand: Demand,
    prefill: WorkerTable,
    decode: WorkerTable,
    pairs: Pairs,
    costs: Costs,
    chosen: tuple[str | None, str] | None,
) -> Iterator[PairReport]:
    everybody = np.arange(len(prefill)), np.arange(len(decode))
    handoff_s, pair_s = costs.handoff_s(*everybody), costs.pair_s(*everybody)
    for p, p_id in enumerate(prefill.engine_ids):
        for d, d_id in enumerate(decode.engine_ids):
            bar = pairs.bars.get((p_id, d_id))
            yield PairReport(
                prefill=p_id,
                decode=d_id,
                ttft_s=float(costs.ttft_s[p]),
                itl_s=float(costs.itl_s[d]),
                cost_s=float(costs.ttft_s[p] + costs.decode_s[d] + (0.0 if bar else pair_s[p, d])),
                refusal=(
                    unfit(prefill, p, demand)
                    or busy(prefill, p, demand)
                    or (bar and f"{p_id} -> {d_id}: {bar.reason}")
                    or unfit(decode, d, demand)
                    or no_room(decode, d, demand)
                ),
                chosen=(p_id, d_id) == chosen,
                cached_tokens=int(costs.cached[p]),
                handoff_s=0.0 if bar else float(handoff_s[p, d]),
                decode_cached_tokens=int(costs.decode_cached[d]),
            )


def _local_reports(
    demand: Demand, decode: WorkerTable, costs: Costs, chosen: tuple[str | None, str] | None
) -> Iterator[PairReport]:
    for d, d_id in enumerate(decode.engine_ids):
        yield PairReport(
            prefill=None,
            decode=d_id,
            ttft_s=float(costs.local_ttft_s[d]),
            itl_s=float(costs.itl_s[d]),
            cost_s=float(costs.local_s[d]),
            refusal=unfit(decode, d, demand) or busy(decode, d, demand) or no_room(decode, d, demand),
            chosen=(None, d_id) == chosen,
            cached_tokens=int(costs.decode_cached[d]),
            others_s=float(costs.others_s[d]),
            decode_cached_tokens=int(costs.decode_cached[d]),
        )
