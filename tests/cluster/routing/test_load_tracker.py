"""What the gateway has booked on each worker."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from cluster.routing.load_tracker import LoadTracker
from cluster.routing.router import Incompatibility, NoPlacement, Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTable, WorkerTraits
from workers.kv_cache.block_pool import blocks_for
from workers.runner.step_times import StepTimes

CAPABILITY = StepTimes(prefill=((16, 0.016), (1600, 1.6)), decode=((1, 0.01), (16, 0.02)))


def traits(engine_id: str, block_size: int = 16, total_blocks: int = 100, max_num_seqs: int = 8) -> WorkerTraits:
    return WorkerTraits(engine_id, 4096, block_size, total_blocks, max_num_seqs, CAPABILITY)


def load_tracker(prefill=("p",), decode=("d",)) -> LoadTracker:
    made = LoadTracker()
    made.update_pools({traits(p): True for p in prefill}, {traits(d): True for d in decode}, {})
    return made


def refusal(made: LoadTracker, num_tokens: int) -> str:
    (report,) = made.explain(RoutingRequest(num_tokens, 10))
    return report.refusal


def test_what_is_booked_is_not_free():
    made = load_tracker()
    assert refusal(made, 100 * 16 - 1) == ""
    made.reserve("r", "p", "d", 50)
    assert refusal(made, 95 * 16 - 1) == ""
    assert refusal(made, 96 * 16) == "d: 97 blocks needed, 96 free"
    made.grown("r", 64)
    assert refusal(made, 96 * 16 - 1) == "d: 96 blocks needed, 95 free"
    made.release("r")
    assert refusal(made, 100 * 16 - 1) == ""
    made.release("r")
    assert refusal(made, 100 * 16 - 1) == ""


def test_prefill_is_free_after_the_first_token():
    made = load_tracker(prefill=("p-0", "p-1"))
    made.reserve("r", "p-0", "d", 1000)
    placement = made.place(RoutingRequest(100, 10))
    assert isinstance(placement, Placement)
    assert placement.prefill == "p-1"
    made.first_token("r")
    assert [report.ttft_s for report in made.explain(RoutingRequest(100, 10))] == pytest.approx([0.1, 0.1], rel=0.05)


def test_a_request_without_a_decode_worker_takes_none():
    made = load_tracker()
    for i in range(20):
        made.reserve(f"r-{i}", "p", "", 1000)
    assert refusal(made, 1) == ""


def test_quarantined_blocks_are_not_free():
    made = load_tracker()
    made.quarantine("d", 90)
    assert refusal(made, 200) == "d: 13 blocks needed, 10 free"
    made.quarantine("d", 0)
    assert refusal(made, 200) == ""
    made.quarantine("nobody", 5)


def test_bars_and_readiness_follow_the_pools():
    made = load_tracker()
    made.update_pools({traits("p"): True}, {traits("d"): False}, {})
    assert refusal(made, 10) == "d: not ready"
    made.update_pools(
        {traits("p"): True}, {traits("d"): True}, {("p", "d"): Incompatibility("no answer", forever=False)}
    )
    assert made.unsupported_reasons(RoutingRequest(10, 10)) == ("p -> d: no answer",)
    made.update_pools({}, {traits("d"): True}, {})
    assert isinstance(made.place(RoutingRequest(10, 10)), NoPlacement)


class BookKeeping(RuleBasedStateMachine):
    """Against books that are reckoned anew from all requests each time."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pools = {"prefill": {traits("p-0"), traits("p-1", 32)}, "decode": {traits("d-0"), traits("d-1", 64)}}
        self.names = {"prefill": 2, "decode": 2}
        self.placed: dict[str, dict] = {}
        self.load_tracker = LoadTracker()
        self.sync()

    def sync(self) -> None:
        self.load_tracker.update_pools(*(dict.fromkeys(self.pools[role], True) for role in ("prefill", "decode")), {})

    @rule(target=requests, num_tokens=st.integers(1, 300), alone=st.booleans())
    def place_one(self, num_tokens, alone):
        name = f"r-{len(self.placed)}"
        placement = self.load_tracker.place(RoutingRequest(num_tokens, 5))
        if isinstance(placement, Placement):
            decode = "" if alone else placement.decode
            self.placed[name] = {"p": placement.prefill, "d": decode, "first": num_tokens, "now": num_tokens}
            self.load_tracker.reserve(name, placement.prefill, decode, num_tokens)
        return name

    @rule(request=requests)
    def first_token(self, request):
        self.load_tracker.first_token(request)
        if request in self.placed:
            self.placed[request]["first"] = None

    @rule(request=requests, more=st.integers(1, 40))
    def grow(self, request, more):
        if request in self.placed:
            self.placed[request]["now"] += more
            self.load_tracker.grown(request, self.placed[request]["now"])

    @rule(request=requests)
    def release(self, request):
        self.load_tracker.release(request)
        if request in self.placed:
            self.placed[request].update(p="", d="")

    @rule(role=st.sampled_from(["prefill", "decode"]), block_size=st.sampled_from([16, 32]))
    def replace_one(self, role, block_size):
        """A worker is lost, and another one comes."""
        self.pools[role].remove(min(self.pools[role], key=lambda t: t.engine_id))
        self.pools[role].add(traits(f"{role[0]}-{self.names[role]}", block_size))
        self.names[role] += 1
        self.sync()

    @invariant()
    def books_are_right(self):
        for t in self.pools["decode"]:
            mine = [r for r in self.placed.values() if r["d"] == t.engine_id]
            used = sum(blocks_for(r["now"] + 1, t.block_size) for r in mine)
            self.check(self.load_tracker.decode_workers, t, used, len(mine), 0.0)
        for t in self.pools["prefill"]:
            mine = [r for r in self.placed.values() if r["p"] == t.engine_id and r["first"]]
            used = sum(blocks_for(r["first"] + 1, t.block_size) for r in mine)
            queued = sum(self.load_tracker.prefill_workers.prefill_seconds_of(t.engine_id, r["first"]) for r in mine)
            self.check(self.load_tracker.prefill_workers, t, used, len(mine), queued)

    def check(self, pool: WorkerTable, t: WorkerTraits, used: int, running: int, queued_s: float) -> None:
        row = pool.row(t.engine_id)
        worker = pool.workers[row]
        assert (worker.traits, worker.free_blocks, worker.running) == (t, t.total_blocks - used, running)
        assert worker.queued_s == pytest.approx(queued_s, abs=1e-9)
        room = min(t.max_model_len, worker.free_blocks * t.block_size) if running < t.max_num_seqs else 0
        assert [pool.column(name)[row] for name in ("running", "queued_s", "room_tokens")] == [
            running, worker.queued_s, room,
        ]  # fmt: skip


BookKeeping.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestBookKeeping = BookKeeping.TestCase


def test_the_growth_of_what_runs_is_left_room():
    made = load_tracker()
    made.reserve("r", "p", "d", 800, max_tokens=700)
    (report,) = made.explain(RoutingRequest(100, 1))
    assert report.refusal == "d: its requests would grow to about 1613 tokens, 1600 fit"
    assert isinstance(made.place(RoutingRequest(100, 1)), NoPlacement)
    assert isinstance(made.place(RoutingRequest(80, 1)), Placement)
    made.release("r")
    assert isinstance(made.place(RoutingRequest(100, 700)), Placement)


def test_an_idle_worker_takes_what_may_outgrow_it():
    made = load_tracker()
    assert isinstance(made.place(RoutingRequest(1500, 4000)), Placement), "waiting would not help"
    made.reserve("r", "p", "d", 10, max_tokens=1)
    assert isinstance(made.place(RoutingRequest(1500, 4000)), NoPlacement)


def test_short_answers_make_room_for_more():
    made = load_tracker()
    made.reserve("r", "p", "d", 800, max_tokens=700)
    for i in range(64):
        made.reserve(f"short-{i}", "p", "d", 10, max_tokens=700)
        made.finished(f"short-{i}", 10 + 20)
    made.grown("r", 832)
    assert refusal(made, 100) != "", "it has outlived them: it may go on to its limit"
    made.release("r")
    made.reserve("r", "p", "d", 800, max_tokens=700)
    assert refusal(made, 100) == ""


def test_quarantined_blocks_are_no_room_to_grow():
    made = load_tracker()
    made.reserve("r", "p", "d", 800, max_tokens=400)
    assert isinstance(made.place(RoutingRequest(100, 1)), Placement)
    made.quarantine("d", 30)
    assert isinstance(made.place(RoutingRequest(100, 1)), NoPlacement)
    made.quarantine("d", 0)
    assert isinstance(made.place(RoutingRequest(100, 1)), Placement)


def test_a_busy_prefill_worker_takes_nothing_more():
    made = LoadTracker(max_queued_s=1.5)
    made.update_pools({traits("p"): True}, {traits("d"): True}, {})
    made.reserve("a", "p", "d", 1000)
    assert isinstance(made.place(RoutingRequest(100, 1)), Placement)
    made.reserve("b", "p", "", 1000)
    assert made.unsupported_reasons(RoutingRequest(100, 1)) == ("p: 2 s of work before it, 1.5 s allowed",)
    assert made.place(RoutingRequest(100, 1)) == NoPlacement(hopeless=False)
    made.first_token("a")
    assert isinstance(made.place(RoutingRequest(100, 1)), Placement)
