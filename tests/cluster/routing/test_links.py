"""What is known of pairs stays with them while workers come and go."""

from __future__ import annotations

import random

import numpy as np

from cluster.routing.links import Links
from cluster.routing.router import Incompatibility
from cluster.routing.worker_table import WorkerTable, WorkerTraits
from kv_transfer.link_cost import LinkCost


def table(*engine_ids: str) -> WorkerTable:
    made = WorkerTable()
    for engine_id in engine_ids:
        made.add(WorkerTraits(engine_id, 1000, 16, 64, 8))
    return made


def seen(known: Links, prefill: WorkerTable, decode: WorkerTable) -> dict[tuple[str, str], tuple[float, float]]:
    """(delay, seconds a byte) of every pair."""
    shape = len(prefill), len(decode)
    ps, ds = np.indices(shape).reshape(2, -1)
    found = known.costs(prefill.column("slot")[ps], decode.column("slot")[ds])
    delays, seconds = (values.reshape(shape) for values in found)
    return {
        (p, d): (delays[i, j], seconds[i, j])
        for i, p in enumerate(prefill.engine_ids)
        for j, d in enumerate(decode.engine_ids)
    }


def test_ways_and_bars_are_those_of_the_pair():
    prefill, decode, known = table("p-0", "p-1"), table("d-0", "d-1"), Links()
    assert not known.differ
    links = {
        "p-0": {"d-0": LinkCost(0.001, 0.0, 1e9)},
        "p-1": {"d-0": LinkCost(0.002, 0.0, 2e9), "d-9": LinkCost(1.0, 0.0, 1.0)},
    }
    known.update(prefill, decode, {("p-1", "d-1"): Incompatibility("no answer", forever=False)}, links)
    assert known.differ
    assert seen(known, prefill, decode) == {
        ("p-0", "d-0"): (0.001, 1e-9),
        ("p-0", "d-1"): (0.001, 5e-10),  # not measured: as the quickest
        ("p-1", "d-0"): (0.002, 5e-10),
        ("p-1", "d-1"): (np.inf, 5e-10),
    }
    known.update(prefill, decode, {}, links)
    assert seen(known, prefill, decode)["p-1", "d-1"] == (0.001, 5e-10), "they have met at last"
    assert seen(known, prefill, decode)["p-1", "d-0"] == (0.002, 5e-10)


def test_a_newcomer_has_nothing_of_the_one_whose_place_it_takes():
    prefill, decode, known = table("p-0"), table("d-0"), Links()
    known.update(prefill, decode, {}, {"p-0": {"d-0": LinkCost(0.5, 0.0, 1e6)}})
    for pool, gone, new in ((prefill, "p-0", "p-1"), (decode, "d-0", "d-1")):
        pool.remove(gone)
        pool.add(WorkerTraits(new, 1000, 16, 64, 8))
    known.update(prefill, decode, {}, {})
    assert seen(known, prefill, decode) == {("p-1", "d-1"): (0.0, 0.0)}
    assert not known.differ


def test_many_come_and_go():
    rng, links, numbers = random.Random(0), {}, 0
    pools, known = {"p": table(), "d": table()}, Links()
    for _ in range(120):
        role = rng.choice("pd")
        ids = list(pools[role].engine_ids)
        if len(ids) > 3 and rng.random() < 0.45:
            gone = rng.choice(ids)
            pools[role].remove(gone)
            links.pop(gone, None)
            for those in links.values():
                those.pop(gone, None)
        else:
            pools[role].add(WorkerTraits(f"{role}-{(numbers := numbers + 1)}", 1000, 16, 64, 8))
        for p in pools["p"].engine_ids:
            for d in pools["d"].engine_ids:
                links.setdefault(p, {}).setdefault(d, LinkCost(rng.random(), 0.0, rng.randint(1, 9)))
        incompatibilities = {
            (p, d): Incompatibility("", rng.random() < 0.5) for p in links for d in links[p] if rng.random() < 0.1
        }
        known.update(pools["p"], pools["d"], incompatibilities, links)
        for (p, d), (delay_s, byte_s) in seen(known, pools["p"], pools["d"]).items():
            assert delay_s == (np.inf if (p, d) in incompatibilities else links[p][d].write_s)
            assert byte_s == 1 / links[p][d].bytes_per_s
    assert len(pools["p"]) > 8, "the arrays have had to grow"


def test_some_fit_unless_all_are_barred_for_ever():
    prefill, decode, known = table("p-0", "p-1"), table("d"), Links()
    slots = prefill.column("slot"), decode.column("slot")
    assert known.some_fit(*slots)
    incompatibilities = {
        ("p-0", "d"): Incompatibility("unlike", forever=True),
        ("p-1", "d"): Incompatibility("no answer", forever=False),
    }
    known.update(prefill, decode, incompatibilities)
    assert known.some_fit(*slots)
    assert not known.some_fit(slots[0][:1], slots[1])
    assert not known.some_fit(slots[0][:0], slots[1])
