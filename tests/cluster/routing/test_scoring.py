"""What a placement is predicted to take: tokens in the cache, the handoff, and prompts computed where they decode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.routing.load_tracker import LoadTracker
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.types import CandidateReport, NoPlacement, Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTraits
from kv_transfer.link_cost import LinkCost
from workers.block_hashes import block_hashes
from workers.messages import CacheUpdate
from workers.runner.step_times import StepTimes

MEASURED = StepTimes(((16, 0.016), (16_000, 16.0)), ((1, 0.010), (101, 0.110)), kv_token_s=1e-6)
"""A prompt token takes 1 ms, a sequence more in the batch 1 ms, and each token in its cache 1 µs."""
TRAITS = WorkerTraits("", 20_000, 16, 4000, 64, MEASURED, kv_token_bytes=1000, num_layers=10, chunk_tokens=100)
QUICK = LinkCost(0.001, 0.0, 1e9)


class Clock:
    """Seconds; a month between two readings, so that nobody is expected to come, or none at all."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def load_tracker(
    prefill=("p",), decode=("d",), links=None, disaggregation: str = "always", step_s: float = 3e6, **settings
) -> LoadTracker:
    made = LoadTracker(disaggregation=disaggregation, clock=Clock(step_s), **settings)
    pools = [{replace(TRAITS, engine_id=name): True for name in names} for names in (prefill, decode)]
    made.update_pools(*pools, {}, {p: dict.fromkeys(decode, QUICK) for p in prefill} if links is None else links)
    return made


def placed(made: LoadTracker, num_tokens: int, max_tokens: int = 64, **more) -> tuple[str | None, str]:
    placement = made.place(RoutingRequest(num_tokens, max_tokens, **more))
    assert isinstance(placement, Placement), placement
    return placement.prefill, placement.decode


def report(made: LoadTracker, asked: RoutingRequest, prefill: str | None = "p", decode: str = "d") -> CandidateReport:
    (found,) = (r for r in made.explain(asked) if (r.prefill, r.decode) == (prefill, decode))
    return found


def decoding(made: LoadTracker, decode: str, count: int, num_tokens: int = 16) -> None:
    """So many sequences run there, which goes on for a while."""
    for i in range(count):
        made.reserve(f"{decode}/{i}", "p", decode, num_tokens, max_tokens=1000)
        made.first_token(f"{decode}/{i}")


def test_a_step_takes_what_its_sequences_and_their_tokens_take():
    made = load_tracker()
    assert report(made, RoutingRequest(1000, 2)).itl_s == pytest.approx(0.010 + 1e-6 * 1001)
    decoding(made, "d", 3, num_tokens=5000)
    expected = 3 * (5000 + 32)  # in the middle of the look-ahead; half a block more each
    assert report(made, RoutingRequest(1000, 2)).itl_s == pytest.approx(0.013 + 1e-6 * (expected + 1001), rel=2e-3)
    made.grown("d/0", 5500)
    assert report(made, RoutingRequest(1000, 2)).itl_s == pytest.approx(0.013 + 1e-6 * (expected + 1501), rel=2e-3)


def test_a_worker_whose_sequences_are_long_is_avoided():
    made = load_tracker(decode=("d-short", "d-long"))
    decoding(made, "d-long", 2, num_tokens=10_000)
    decoding(made, "d-short", 10, num_tokens=16)
    assert placed(made, 100) == ("p", "d-short"), "ten short ones take 10 ms a step, two long ones 20"
    decoding(made, "d-short", 30, num_tokens=16)
    assert placed(made, 100) == ("p", "d-long")


@pytest.mark.parametrize(
    ("bytes_per_s", "handoff_s"),
    [
        (1e9, 0.001 + 0.01 / 10),  # ten layers in 10 ms, while a second is computed: the last layer is left
        (2e6, 0.001 + 5.0 / 10),  # five seconds' worth; computing takes ten
        (0.5e6, 0.001 + 20.0 - 10.0),  # twenty seconds' worth, of which ten are hidden
    ],
)
def test_what_prefill_does_not_hide_of_a_handoff(bytes_per_s, handoff_s):
    made = load_tracker(links={"p": {"d": LinkCost(0.001, 0.0, bytes_per_s)}})
    shown = report(made, RoutingRequest(10_000, 64))
    assert shown.handoff_s == pytest.approx(handoff_s, rel=0.01)
    assert shown.cost_s == pytest.approx(shown.ttft_s + shown.handoff_s + 64 * shown.itl_s)
    assert shown.ttft_s == pytest.approx(10.0), "the first token does not wait for it"


def test_without_a_second_token_there_is_no_handoff():
    made = load_tracker(links={"p": {"d": LinkCost(1.0, 0.0, 1.0)}})
    assert report(made, RoutingRequest(1000, 1)).handoff_s == 0.0


def test_a_slow_way_is_avoided_where_there_is_much_to_move():
    slow, quick = LinkCost(0.0, 0.0, 0.8e6), LinkCost(0.3, 0.0, 1e9)
    made = load_tracker(prefill=("p-slow", "p-quick"), links={"p-slow": {"d": slow}, "p-quick": {"d": quick}})
    assert placed(made, 8000) == ("p-quick", "d"), "2 s more than computing hides, against 0.3 s"
    assert placed(made, 200) == ("p-slow", "d")


def test_a_slow_link_is_taken_rather_than_a_long_wait():
    made = load_tracker(
        prefill=("p-slow", "p-quick"), links={"p-slow": {"d": LinkCost(0.0, 0.0, 0.8e6)}, "p-quick": {"d": QUICK}}
    )
    made.reserve("r", "p-quick", "d", 1500)
    assert placed(made, 8000) == ("p-quick", "d")
    made.reserve("s", "p-quick", "d", 1500)
    assert placed(made, 8000) == ("p-slow", "d")


PROMPT = tuple(range(8000))


def stores(made: LoadTracker, engine_id: str, num_tokens: int) -> None:
    made.cache_update(engine_id, CacheUpdate(block_hashes(PROMPT[:num_tokens], 16), ()))


@pytest.mark.parametrize(("bytes_per_s", "there"), [(0.5e6, "d-knows"), (1e12, "d-idle")])
def test_where_the_way_is_slow_what_the_decode_worker_has_is_worth_a_busier_batch(bytes_per_s, there):
    link = LinkCost(0.0, 0.0, bytes_per_s)
    made = load_tracker(decode=("d-knows", "d-idle"), links={"p": {"d-knows": link, "d-idle": link}})
    decoding(made, "d-knows", 5)
    stores(made, "d-knows", 7200)
    asked = RoutingRequest(8000, 64, prefix=PromptPrefix(PROMPT))
    assert placed(made, 8000, prefix=asked.prefix) == ("p", there)
    shown = report(made, asked, "p", "d-knows")
    assert (shown.cached_tokens, shown.decode_cached_tokens) == (0, 7200)


def test_only_what_neither_has_takes_time():
    """Prefill has cached so much that it hides nothing; the decode worker has the half of it."""
    made = load_tracker(links={"p": {"d": LinkCost(0.0, 0.0, 1e6)}})
    stores(made, "p", 7984)
    stores(made, "d", 4000)
    shown = report(made, RoutingRequest(8000, 64, prefix=PromptPrefix(PROMPT)))
    assert shown.handoff_s == pytest.approx(4.0 - 0.016, rel=0.01)


def test_an_idle_decode_worker_computes_by_itself():
    made = load_tracker(disaggregation="auto")
    assert placed(made, 100) == (None, "d")
    placement = made.place(RoutingRequest(100, 64))
    assert isinstance(placement, Placement)
    assert placement.ttft_s == pytest.approx(0.1)


def test_an_idle_one_is_kept_free_for_those_who_will_come():
    """Ten requests a second are expected, and each would wait for half of what is left of the prompt."""
    made = load_tracker(disaggregation="auto", step_s=0.0)
    for i in range(300):
        made.reserve(str(i), "p", "d", 16)
        made.release(str(i))
    assert placed(made, 16) == ("p", "d"), "16 ms of it, and 2 ms for a handoff"
    made.reserve("r", "p", "", 50)
    assert placed(made, 16) == (None, "d"), "50 ms of waiting"
    assert placed(made, 200) == ("p", "d")
    assert report(made, RoutingRequest(200, 64), None).others_s == pytest.approx(0.2 * 0.2 * 0.5 * 301 / 30, rel=1e-3)


@pytest.mark.parametrize(("num_tokens", "running", "prefill"), [(5, 1, "p"), (3000, 1, "p"), (3000, 20, "p")])
def test_a_busy_one_is_not_stopped_for_a_prompt_that_others_can_compute(num_tokens, running, prefill):
    made = load_tracker(disaggregation="auto")
    decoding(made, "d", running)
    assert placed(made, num_tokens) == (prefill, "d")


def test_a_short_rest_of_a_prompt_is_computed_where_the_others_decode():
    """Moving a long prompt that is cached on either side costs more than to stop two sequences for a block."""
    made = load_tracker(disaggregation="auto", links={"p": {"d": LinkCost(0.06, 0.0, 1e9)}})
    decoding(made, "d", 2)
    prefix = PromptPrefix(PROMPT)
    assert placed(made, 8000, prefix=prefix) == ("p", "d"), "16 s of standstill"
    stores(made, "p", 7984)
    stores(made, "d", 7984)
    assert placed(made, 8000, prefix=prefix) == (None, "d"), "0.032 s of standstill, and a handoff takes 0.06"
    decoding(made, "d", 5)
    assert placed(made, 8000, prefix=prefix) == ("p", "d"), "0.08 s"


def test_where_prefill_is_far_behind_decode_helps():
    made = load_tracker(disaggregation="auto")
    decoding(made, "d", 3)
    assert placed(made, 1000) == ("p", "d")
    made.reserve("a", "p", "", 2500)
    assert placed(made, 1000) == ("p", "d"), "2.5 s of waiting, and 3 s of standstill"
    made.reserve("b", "p", "", 1000)
    assert placed(made, 1000) == (None, "d")


def test_what_others_wait_for_a_prompt_is_shown_and_counted():
    made = load_tracker(disaggregation="auto")
    decoding(made, "d", 3)
    shown = report(made, RoutingRequest(1000, 64), None)
    assert shown.others_s == pytest.approx(3 * 1.0)
    assert shown.ttft_s == pytest.approx(1.0 + 10 * 0.013), "a step of the batch with each of ten chunks"
    assert shown.cost_s == pytest.approx(shown.ttft_s + shown.others_s + 64 * shown.itl_s)
    assert shown.handoff_s == 0.0


def test_prompts_on_a_decode_worker_are_waited_for():
    made = load_tracker(decode=("d-0", "d-1"), disaggregation="auto")
    made.reserve("r", None, "d-0", 3000)
    assert report(made, RoutingRequest(100, 64), None, "d-0").ttft_s == pytest.approx(3.0 + 0.1 + 0.011)
    assert placed(made, 100)[1] == "d-1"
    behind = report(made, RoutingRequest(1000, 64), "p", "d-0")
    assert behind.cost_s == pytest.approx(behind.ttft_s + behind.handoff_s + 2.0 + 64 * behind.itl_s)
    made.first_token("r")
    assert report(made, RoutingRequest(100, 64), None, "d-0").ttft_s == pytest.approx(0.1 + 0.011)
    made.release("r")
    assert report(made, RoutingRequest(100, 64), None, "d-0").ttft_s == pytest.approx(0.1)


def test_a_request_that_goes_before_its_first_token_leaves_no_work_behind():
    made = load_tracker(disaggregation="auto")
    made.reserve("r", None, "d", 3000)
    made.release("r")
    assert report(made, RoutingRequest(100, 64), None) == report(
        load_tracker(disaggregation="auto"), RoutingRequest(100, 64), None
    )


def test_a_worker_with_enough_prompts_computes_no_more():
    made = load_tracker(disaggregation="never", max_queued_s=1.0)
    made.reserve("r", None, "d", 2000)
    assert made.place(RoutingRequest(10, 64)) == NoPlacement(hopeless=False)
    assert made.unsupported_reasons(RoutingRequest(10, 64)) == ("d: 2 s of work before it, 1 s allowed",)


@pytest.mark.parametrize(
    ("disaggregation", "candidates"),
    [
        ("always", {("p", "d-0"), ("p", "d-1")}),
        ("never", {(None, "d-0"), (None, "d-1")}),
        ("auto", {("p", "d-0"), ("p", "d-1"), (None, "d-0"), (None, "d-1")}),
    ],
)
def test_where_prompts_may_be_computed(disaggregation, candidates):
    made = load_tracker(decode=("d-0", "d-1"), disaggregation=disaggregation)
    reports = made.explain(RoutingRequest(100, 64))
    assert {(r.prefill, r.decode) for r in reports} == candidates
    assert [r.chosen for r in reports] == [True] + [False] * (len(candidates) - 1)


@pytest.mark.parametrize(
    ("disaggregation", "num_tokens", "outcome"),
    [
        ("never", 100, (None, "d")),
        ("auto", 100, (None, "d")),
        ("always", 100, NoPlacement(hopeless=False)),
        ("never", 30_000, NoPlacement(hopeless=True)),
        ("always", 30_000, NoPlacement(hopeless=False)),
    ],
)
def test_without_prefill_workers(disaggregation, num_tokens, outcome):
    placement = load_tracker(prefill=(), disaggregation=disaggregation).place(RoutingRequest(num_tokens, 64))
    assert (placement if isinstance(placement, NoPlacement) else (placement.prefill, placement.decode)) == outcome


def test_what_no_decode_worker_could_hold_is_hopeless_wherever_it_is_computed():
    made = load_tracker(disaggregation="auto")
    assert made.place(RoutingRequest(30_000, 64)) == NoPlacement(hopeless=True)
    reasons = [f"{name}: 30000 prompt tokens, context window 20000" for name in "dp"]
    assert sorted(made.unsupported_reasons(RoutingRequest(30_000, 64))) == reasons


def test_a_pair_on_which_a_handoff_failed_is_the_last_to_be_taken_for_a_while() -> None:
    made = load_tracker(("p", "q"), ("d",), step_s=0.0)
    made.reserve("busy", "q", "d", 4000)
    assert placed(made, 100) == ("p", "d"), "4 s of prompts are before it on the other"
    made.handoff_failed("p", "d")
    assert placed(made, 100) == ("q", "d"), "5 s for a failure are more"
    later = load_tracker(("p", "q"), ("d",), step_s=1.0)
    later.reserve("busy", "q", "d", 4000)
    later.handoff_failed("p", "d")
    for _ in range(30):
        last = placed(later, 100)
    assert last == ("p", "d"), "half of it counts after 15 s"


def test_a_failure_that_is_told_after_its_worker_is_gone_harms_nobody() -> None:
    made = load_tracker(("p",), ("d",), step_s=0.0)
    made.handoff_failed("gone", "d")
    made.handoff_failed("p", "gone")
    assert placed(made, 100) == ("p", "d")


def test_failures_of_workers_that_are_gone_are_forgotten() -> None:
    made = load_tracker(("p", "q"), ("d",), step_s=0.0)
    made.handoff_failed("p", "d")
    without = {replace(TRAITS, engine_id="q"): True}, {replace(TRAITS, engine_id="d"): True}
    made.update_pools(*without, {})
    both = {replace(TRAITS, engine_id=name): True for name in ("p", "q")}
    made.update_pools(both, without[1], {})
    made.reserve("busy", "q", "d", 100)
    assert placed(made, 100) == ("p", "d")


@pytest.mark.parametrize("disaggregation", ["always", "auto"])
def test_a_pair_to_avoid_is_taken_only_where_there_is_no_other(disaggregation: str) -> None:
    made = load_tracker(("p", "q"), ("d", "e"), disaggregation=disaggregation)
    pairs = [(p, d) for p in ("p", "q") for d in ("d", "e")]
    for left in pairs:
        avoid = frozenset(pair for pair in pairs if pair != left)
        found = placed(made, 4000, avoid=avoid)
        assert found == left or found[0] is None
    if disaggregation == "always":
        assert placed(made, 4000, avoid=frozenset(pairs)) in pairs
    assert placed(made, 4000, avoid=frozenset({("gone", "d")})) == placed(made, 4000)
