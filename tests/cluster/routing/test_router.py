"""Which pair serves a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing.links import Links
from cluster.routing.prefill_times import PROMPT_LENGTHS
from cluster.routing.router import (
    Incompatibility,
    NoPlacement,
    Placement,
    RoutingRequest,
    explain,
    place,
    unsupported_reasons,
)
from cluster.routing.worker_table import WorkerTable, WorkerTraits
from workers.runner.step_times import StepTimes

FAST = StepTimes(prefill=((16, 0.016), (1600, 1.6)), decode=((1, 0.01), (10, 0.02)))
SLOW = StepTimes(prefill=((16, 0.16), (1600, 16.0)), decode=((1, 0.1), (10, 0.2)))
UNKNOWN = StepTimes()
ASKED = RoutingRequest(100, 64)


def pool(*workers: dict) -> WorkerTable:
    """A table of workers: traits, and `ready`, `running`, `used` blocks and `queued_s` on top."""
    table = WorkerTable()
    for changes in workers:
        given = {"max_model_len": 1000, "block_size": 16, "total_blocks": 64, "max_num_seqs": 8, "step_times": FAST}
        given |= changes
        ready, running = given.pop("ready", True), given.pop("running", 0)
        used, queued_s = given.pop("used", 0), given.pop("queued_s", 0.0)
        traits = WorkerTraits(**given)
        table.add(traits, ready=ready)
        table.take(traits.engine_id, blocks=used, requests=running, queued_s=queued_s)
    return table


def worker(engine_id: str, **changes) -> dict:
    return {"engine_id": engine_id, **changes}


def known(prefill: WorkerTable, decode: WorkerTable, incompatibilities=None, links=None) -> Links:
    made = Links()
    made.update(prefill, decode, incompatibilities or {}, links)
    return made


def chosen(prefill: WorkerTable, decode: WorkerTable, incompatibilities=None, asked=ASKED) -> tuple[str, str]:
    placement = place(asked, prefill, decode, known(prefill, decode, incompatibilities))
    assert isinstance(placement, Placement), placement
    return placement.prefill, placement.decode


def refused(prefill: WorkerTable, decode: WorkerTable, incompatibilities=None) -> tuple[bool, tuple[str, ...]]:
    placement = place(ASKED, prefill, decode, known(prefill, decode, incompatibilities))
    assert isinstance(placement, NoPlacement), placement
    return placement.hopeless, unsupported_reasons(ASKED, prefill, decode, known(prefill, decode, incompatibilities))


def test_the_faster_pair_is_chosen():
    prefill = pool(worker("p-slow", step_times=SLOW), worker("p-fast"))
    decode = pool(worker("d-slow", step_times=SLOW), worker("d-fast"))
    assert chosen(prefill, decode) == ("p-fast", "d-fast")
    placement = place(ASKED, prefill, decode, known(prefill, decode))
    assert isinstance(placement, Placement)
    assert (placement.ttft_s, placement.itl_s) == (pytest.approx(0.1, rel=0.02), pytest.approx(0.01))


def test_prompts_that_are_queued_count():
    prefill = pool(worker("p-0", queued_s=2.0), worker("p-1", step_times=SLOW))
    assert chosen(prefill, pool(worker("d"))) == ("p-1", "d")


def test_the_batch_counts():
    assert chosen(pool(worker("p")), pool(worker("d-0", running=7), worker("d-1", running=1))) == ("p", "d-1")


def test_unmeasured_workers_share_the_load():
    unknown = pool(worker("d-0", running=3, step_times=UNKNOWN), worker("d-1", running=2, step_times=UNKNOWN))
    assert chosen(pool(worker("p", step_times=UNKNOWN)), unknown) == ("p", "d-1")


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 100, 1000, 100_000, 2**20, 2**21])
def test_the_time_of_a_prompt_is_the_one_that_was_measured(num_tokens):
    step_times = StepTimes(prefill=tuple((n, 1e-6 * n) for n in PROMPT_LENGTHS))
    (seconds,) = pool(worker("p", step_times=step_times)).prefill_seconds(num_tokens)
    assert seconds == pytest.approx(max(1e-6 * num_tokens, 16e-6))


def test_only_pairs_that_can_work_together_are_used():
    prefill = pool(worker("p-16"), worker("p-32", block_size=32, step_times=SLOW))
    decode = pool(worker("d-32", block_size=32))
    incompatibilities = {("p-16", "d-32"): Incompatibility("block_size is 32 here and 16 there", forever=True)}
    assert chosen(prefill, decode, incompatibilities) == ("p-32", "d-32")


def test_the_best_of_the_pairs_that_are_left_is_chosen():
    prefill, decode = pool(worker("p-0"), worker("p-1", queued_s=1.0)), pool(worker("d-0"), worker("d-1", running=5))
    assert chosen(prefill, decode, {("p-0", "d-0"): Incompatibility("no answer", forever=False)}) == ("p-0", "d-1")


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ({"max_model_len": 100}, {}, "p: 100 prompt tokens, context window 100"),
        ({}, {"max_model_len": 100}, "d: 100 prompt tokens, context window 100"),
        ({}, {"total_blocks": 6}, "d: 7 blocks needed, 6 in all"),
        ({"total_blocks": 6}, {}, "p: 7 blocks needed, 6 in all"),
    ],
)
def test_what_waiting_does_not_help_is_hopeless(prefill, decode, reason):
    assert refused(pool(worker("p", **prefill)), pool(worker("d", **decode))) == (True, (reason,))


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ({"ready": False}, {}, "p: not ready"),
        ({}, {"ready": False}, "d: not ready"),
        ({}, {"running": 8}, "d: its batch is full"),
        ({}, {"used": 58}, "d: 7 blocks needed, 6 free"),
    ],
)
def test_what_waiting_helps_is_not_hopeless(prefill, decode, reason):
    assert refused(pool(worker("p", **prefill)), pool(worker("d", **decode))) == (False, (reason,))


@pytest.mark.parametrize("forever", [True, False])
def test_a_bar_is_hopeless_if_it_lasts(forever):
    incompatibilities = {("p", "d"): Incompatibility("unlike layouts", forever)}
    assert refused(pool(worker("p")), pool(worker("d")), incompatibilities) == (forever, ("p -> d: unlike layouts",))


def test_one_hope_is_enough():
    hopeless, reasons = refused(pool(worker("p")), pool(worker("d-small", total_blocks=4), worker("d-full", used=64)))
    assert not hopeless
    assert len(reasons) == 2


@pytest.mark.parametrize("pools", [((), ()), ((worker("p"),), ()), ((), (worker("d"),))])
def test_an_empty_pool_may_yet_fill(pools):
    assert refused(*(pool(*workers) for workers in pools)) == (False, ("there are no workers",))


def test_a_busy_prefill_worker_still_takes_prompts():
    assert chosen(pool(worker("p", used=64, running=8)), pool(worker("d"))) == ("p", "d")


def test_workers_come_and_go():
    table = pool(*(worker(f"w-{i}", running=i % 8) for i in range(20)))
    for i in (0, 19, 7, 3):
        table.remove(f"w-{i}")
    assert sorted(table.engine_ids) == sorted(f"w-{i}" for i in range(20) if i not in (0, 19, 7, 3))
    for engine_id in table.engine_ids:
        row = table.row(engine_id)
        assert table.engine_ids[row] == engine_id
        assert table.column("running")[row] == int(engine_id[2:]) % 8


def test_the_explanation_names_every_pair():
    prefill = pool(worker("p-0"), worker("p-1", step_times=SLOW), worker("p-2", ready=False))
    decode = pool(worker("d-0"), worker("d-1", running=8))
    reports = explain(
        ASKED,
        prefill,
        decode,
        known(prefill, decode, {("p-1", "d-0"): Incompatibility("no answer", forever=False)}),
    )
    assert [(r.prefill, r.decode) for r in reports if r.chosen] == [("p-0", "d-0")]
    assert reports[0].chosen
    assert {(r.prefill, r.decode): r.refusal for r in reports} == {
        ("p-0", "d-0"): "",
        ("p-1", "d-0"): "p-1 -> d-0: no answer",
        ("p-2", "d-0"): "p-2: not ready",
        ("p-0", "d-1"): "d-1: its batch is full",
        ("p-1", "d-1"): "d-1: its batch is full",
        ("p-2", "d-1"): "p-2: not ready",
    }
    assert reports[0].cost_s == pytest.approx(reports[0].ttft_s + 64 * reports[0].itl_s)


workers = st.lists(
    st.fixed_dictionaries(
        {
            "engine_id": st.sampled_from("abcdef"),
            "ready": st.booleans(),
            "max_model_len": st.sampled_from([50, 200]),
            "block_size": st.sampled_from([16, 32]),
            "total_blocks": st.integers(1, 20),
            "used": st.integers(0, 23),
            "max_num_seqs": st.integers(1, 4),
            "running": st.integers(0, 5),
            "queued_s": st.sampled_from([0.0, 0.2]),
            "step_times": st.sampled_from([FAST, SLOW, UNKNOWN]),
        }
    ),
    max_size=4,
    unique_by=lambda w: w["engine_id"],
)
pairs = st.dictionaries(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")),
    st.builds(Incompatibility, st.just("no"), st.booleans()),
)


@given(st.builds(RoutingRequest, st.integers(1, 120), st.integers(1, 100)), workers, workers, pairs)
def test_the_cheapest_pair_that_fits_is_chosen(routing_request, prefill, decode, incompatibilities):
    p_table, d_table = pool(*prefill), pool(*decode)
    links = known(p_table, d_table, incompatibilities)
    placement = place(routing_request, p_table, d_table, links)
    reports = explain(routing_request, p_table, d_table, links)
    fitting = [r for r in reports if not r.refusal]
    for r in reports:  # the refusals, from first principles
        p, d = (next(w for w in ws if w["engine_id"] == e) for ws, e in ((prefill, r.prefill), (decode, r.decode)))
        needs = routing_request.prompt_tokens + 1
        fits = (
            p["ready"]
            and d["ready"]
            and d["running"] < d["max_num_seqs"]
            and (r.prefill, r.decode) not in incompatibilities
            and min(p["max_model_len"], d["max_model_len"]) >= needs
            and p["total_blocks"] * p["block_size"] >= needs
            and (d["total_blocks"] - d["used"]) * d["block_size"] >= needs
        )  # fmt: skip
        assert fits == (not r.refusal)
    if isinstance(placement, Placement):
        (best,) = (r for r in fitting if r.chosen)
        assert best.cost_s <= min(r.cost_s for r in fitting) * (1 + 1e-6)
    else:
        assert not fitting
        assert not placement.hopeless or all(r.refusal for r in reports)
