"""Which workers serve a request: filter by what they can do, then score by measured cost and load.

Plain data in, plain data out; knows neither Ray nor requests under way. Costs are predictions from each worker's own
measurements; there is no table of hardware here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from cluster.routing.filters import busy, fits, has_room, is_hopeless, no_room, takes_more, unfit
from cluster.routing.links import Links
from cluster.routing.picker import cheapest_pair
from cluster.routing.scoring import Decoding, Handoffs, Local, Prefilling
from cluster.routing.types import (
    CandidateReport,
    Incompatibilities,
    Incompatibility,
    NoPlacement,
    Placement,
    RoutingRequest,
)
from cluster.routing.worker_table import WorkerTable

__all__ = [
    "CandidateReport",
    "Choose",
    "Incompatibilities",
    "Incompatibility",
    "Links",
    "NoPlacement",
    "Placement",
    "RoutingRequest",
    "explain",
    "place",
    "unsupported_reasons",
]

_CLOSE_ENOUGH = 0.01
"""A pair is not looked for that would be better by less than this share: nothing is predicted so well."""
_EVEN_S = 1e-9
"""What a request on a worker counts for beside the cost: of equals the one with the fewest is chosen."""

_Floats = npt.NDArray[np.float64]

Choose = Callable[[RoutingRequest, WorkerTable, WorkerTable, Links], Placement | NoPlacement]
"""How workers are chosen from (request, prefill pool, decode pool, links): `place`, or a policy to compare with."""


def place(request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links) -> Placement | NoPlacement:
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
        request: what the request needs; which of the two may be chosen at all.
        prefill: the prefill pool.
        decode: the decode pool.
        links: what is known of pairs of them.
    """
    able = has_room(decode, request)
    if not np.count_nonzero(able):
        return NoPlacement(is_hopeless(request, prefill, decode, links))
    decoding = Decoding(request, decode)
    cost = _among(able, decoding.steps_s, decode)
    pair = _best_pair(request, prefill, decode, links, decoding, cost) if request.in_pairs else None
    alone = _best_alone(request, decode, decoding, cost) if request.alone else None
    if pair is not None and (alone is None or pair[1] <= alone[1]):
        return pair[0]
    return alone[0] if alone is not None else NoPlacement(is_hopeless(request, prefill, decode, links))


def explain(request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links) -> list[CandidateReport]:
    """Every pair and every decode worker alone, as far as the request allows for either; see `place`.

    Those that can serve the request come first, best first.
    """
    placement = place(request, prefill, decode, links)
    chosen = (placement.prefill, placement.decode) if isinstance(placement, Placement) else None
    decoding = Decoding(request, decode)
    reports: list[CandidateReport] = []
    if request.in_pairs:
        reports += _pair_reports(request, prefill, decode, links, decoding, chosen)
    if request.alone:
        reports += _local_reports(request, decode, decoding, chosen)
    return sorted(reports, key=lambda r: (bool(r.refusal), not r.chosen, r.cost_s, r.prefill or "", r.decode))


def unsupported_reasons(
    request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links
) -> tuple[str, ...]:
    """Why nobody can take the request now, each reason once."""
    reports = explain(request, prefill, decode, links)
    return tuple(dict.fromkeys(report.refusal for report in reports if report.refusal)) or ("there are no workers",)


def _best_pair(
    request: RoutingRequest,
    prefill: WorkerTable,
    decode: WorkerTable,
    links: Links,
    decoding: Decoding,
    d_cost: _Floats,
) -> tuple[Placement, float] | None:
    """The cheapest pair and its cost, with decode workers of these costs; None: no pair can take the request."""
    able = fits(prefill, request) & takes_more(prefill, request)
    if not np.count_nonzero(able):
        return None
    prefilling = Prefilling(request, prefill)
    p_cost = _among(able, prefilling.ttft_s, prefill)
    handoffs = Handoffs(request, prefill, decode, links, prefilling, decoding)
    if handoffs.differ:
        best = cheapest_pair(p_cost, d_cost, handoffs.pair_s, handoffs.least_s, _CLOSE_ENOUGH)
        if best is None:
            return None
        p, d, cost = best
    else:
        p, d = int(p_cost.argmin()), int(d_cost.argmin())
        cost = float(p_cost[p] + d_cost[d])
    cached, ttft_s = int(prefilling.cached[p]), float(prefilling.ttft_s[p])
    return Placement(prefill.engine_ids[p], decode.engine_ids[d], ttft_s, float(decoding.itl_s[d]), cached), cost


def _best_alone(
    request: RoutingRequest, decode: WorkerTable, decoding: Decoding, d_cost: _Floats
) -> tuple[Placement, float] | None:
    """The cheapest decode worker that computes the prompt itself, and its cost; None: none can."""
    local = Local(request, decode, decoding)
    costs = np.where(takes_more(decode, request), d_cost, np.inf)
    costs += local.ttft_s
    costs += local.others_s
    d = int(costs.argmin())
    if (cost := float(costs[d])) == np.inf:
        return None
    cached, ttft_s = int(local.cached[d]), float(local.ttft_s[d])
    return Placement(None, decode.engine_ids[d], ttft_s, float(decoding.itl_s[d]), cached), cost


def _among(able: npt.NDArray[np.bool_], cost: _Floats, table: WorkerTable) -> _Floats:
    costs = table.column("running") * _EVEN_S
    costs += cost
    return np.where(able, costs, np.inf)


def _pair_reports(
    request: RoutingRequest,
    prefill: WorkerTable,
    decode: WorkerTable,
    links: Links,
    decoding: Decoding,
    chosen: tuple[str | None, str] | None,
) -> Iterator[CandidateReport]:
    prefilling = Prefilling(request, prefill)
    handoffs = Handoffs(request, prefill, decode, links, prefilling, decoding)
    shape = len(prefill), len(decode)
    ps, ds = np.indices(shape).reshape(2, -1)
    handoff_s, pair_s = handoffs.handoff_s(ps, ds).reshape(shape), handoffs.pair_s(ps, ds).reshape(shape)
    for p, p_id in enumerate(prefill.engine_ids):
        for d, d_id in enumerate(decode.engine_ids):
            incompatibility = links.incompatibilities.get((p_id, d_id))
            yield CandidateReport(
                prefill=p_id,
                decode=d_id,
                ttft_s=float(prefilling.ttft_s[p]),
                itl_s=float(decoding.itl_s[d]),
                cost_s=float(prefilling.ttft_s[p] + decoding.steps_s[d] + (0.0 if incompatibility else pair_s[p, d])),
                refusal=(
                    unfit(prefill, p, request)
                    or busy(prefill, p, request)
                    or (incompatibility and f"{p_id} -> {d_id}: {incompatibility.reason}")
                    or unfit(decode, d, request)
                    or no_room(decode, d, request)
                ),
                chosen=(p_id, d_id) == chosen,
                cached_tokens=int(prefilling.cached[p]),
                handoff_s=0.0 if incompatibility else float(handoff_s[p, d]),
                decode_cached_tokens=int(decoding.cached[d]),
            )


def _local_reports(
    request: RoutingRequest, decode: WorkerTable, decoding: Decoding, chosen: tuple[str | None, str] | None
) -> Iterator[CandidateReport]:
    local = Local(request, decode, decoding)
    for d, d_id in enumerate(decode.engine_ids):
        yield CandidateReport(
            prefill=None,
            decode=d_id,
            ttft_s=float(local.ttft_s[d]),
            itl_s=float(decoding.itl_s[d]),
            cost_s=float(local.ttft_s[d] + local.others_s[d] + decoding.steps_s[d]),
            refusal=unfit(decode, d, request) or busy(decode, d, request) or no_room(decode, d, request),
            chosen=(None, d_id) == chosen,
            cached_tokens=int(local.cached[d]),
            others_s=float(local.others_s[d]),
            decode_cached_tokens=int(decoding.cached[d]),
        )
