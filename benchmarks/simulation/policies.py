"""Other ways to choose a pair, to compare the router's with: what a plain load balancer would do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cluster.routing.filters import fits, has_room, is_hopeless, takes_more
from cluster.routing.router import Choose, Links, NoPlacement, Placement, RoutingRequest, place
from cluster.routing.worker_table import WorkerTable


def round_robin() -> Choose:
    """One after the other, of those that can take the request."""
    turns = itertools.count()

    def choose(
        request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links
    ) -> Placement | NoPlacement:
        turn = next(turns)
        return _pair(request, prefill, decode, links, lambda table, able: int(able[turn % len(able)]))

    return choose


def least_loaded() -> Choose:
    """Whoever has the fewest requests, of those that can take it."""

    def choose(
        request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links
    ) -> Placement | NoPlacement:
        return _pair(
            request, prefill, decode, links, lambda table, able: int(able[table.column("running")[able].argmin()])
        )

    return choose


POLICIES: dict[str, Callable[[], Choose]] = {
    "predicted time": lambda: place,
    "least loaded": least_loaded,
    "round robin": round_robin,
}
"""Name to what makes the policy, new for each run."""


def _pair(
    request: RoutingRequest,
    prefill: WorkerTable,
    decode: WorkerTable,
    links: Links,
    pick: Callable[[WorkerTable, npt.NDArray[np.intp]], int],
) -> Placement | NoPlacement:
    ps = np.flatnonzero(fits(prefill, request) & takes_more(prefill, request))
    ds = np.flatnonzero(fits(decode, request) & has_room(decode, request))
    if not len(ps) or not len(ds):
        return NoPlacement(is_hopeless(request, prefill, decode, links))
    return Placement(prefill.engine_ids[pick(prefill, ps)], decode.engine_ids[pick(decode, ds)], 0.0, 0.0)
