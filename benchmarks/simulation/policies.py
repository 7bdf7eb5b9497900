"""Other ways to choose a pair, to compare the router's with: what a plain load balancer would do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cluster.routing.filters import fits, has_room, is_hopeless, takes_more
from cluster.routing.router import Choose, NoPlacement, Pairs, Placement, RoutingRequest, place
from cluster.routing.worker_table import WorkerTable


def round_robin() -> Choose:
    """One after the other, of those that can take the request."""
    turns = itertools.count()

    def choose(
        demand: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs
    ) -> Placement | NoPlacement:
        turn = next(turns)
        return _pair(demand, prefill, decode, pairs, lambda table, able: int(able[turn % len(able)]))

    return choose


def least_loaded() -> Choose:
    """Whoever has the fewest requests, of those that can take it."""

    def choose(
        demand: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs
    ) -> Placement | NoPlacement:
        return _pair(
            demand, prefill, decode, pairs, lambda table, able: int(able[table.column("running")[able].argmin()])
        )

    return choose


POLICIES: dict[str, Callable[[], Choose]] = {
    "predicted time": lambda: place,
    "least loaded": least_loaded,
    "round robin": round_robin,
}
"""Name to what makes the policy, new for each run."""


def _pair(
    demand: RoutingRequest,
    prefill: WorkerTable,
    decode: WorkerTable,
    pairs: Pairs,
    pick: Callable[[WorkerTable, npt.NDArray[np.intp]], int],
) -> Placement | NoPlacement:
    ps = np.flatnonzero(fits(prefill, demand) & takes_more(prefill, demand))
    ds = np.flatnonzero(fits(decode, demand) & has_room(decode, demand))
    if not len(ps) or not len(ds):
        return NoPlacement(is_hopeless(demand, prefill, decode, pairs))
    return Placement(prefill.engine_ids[pick(prefill, ps)], decode.engine_ids[pick(decode, ds)], 0.0, 0.0)
