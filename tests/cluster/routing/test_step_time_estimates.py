"""Whose measurements a worker is judged by, on plain numbers, and that the router follows."""

from __future__ import annotations

from cluster.routing.load_tracker import LoadTracker
from cluster.routing.step_time_estimates import StepTimeEstimates, scaled
from cluster.routing.types import Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTraits
from workers.runner.step_times import StepTimes

EQUAL = StepTimes(((32, 0.0012), (512, 0.01)), ((1, 0.001), (16, 0.002)), 1e-7)
NOISY = scaled(EQUAL, 27 / 1.2)


def estimates(**measured: StepTimes) -> tuple[StepTimeEstimates, dict[str, StepTimes]]:
    made, known = StepTimeEstimates(), {}
    for engine_id, times in measured.items():
        known |= made.add(engine_id, "gpu", times)
    return made, known


def test_one_of_three_that_measured_noise_is_taken_to_be_like_the_others() -> None:
    _, known = estimates(a=EQUAL, b=scaled(EQUAL, 1.1), c=NOISY)
    assert (known["a"], known["b"]) == (EQUAL, scaled(EQUAL, 1.1))
    assert known["c"] == scaled(EQUAL, 1.1)


def test_of_two_and_of_unlike_ones_each_goes_by_its_own() -> None:
    made, known = estimates(a=EQUAL, b=NOISY)
    assert known["b"] == NOISY
    known |= made.add("slow", "cpu", NOISY)
    assert (known["slow"], known["b"]) == (NOISY, NOISY)


def test_a_worker_that_serves_goes_by_its_pace_and_its_peers_follow_when_it_is_lost() -> None:
    made, _ = estimates(a=EQUAL, b=EQUAL, c=NOISY)
    news = made.hear("c", 1.0, 0.0)  # it is slow indeed, with prompts
    assert set(news) == {"c"}
    assert news["c"].prefill == NOISY.prefill
    assert news["c"].decode == EQUAL.decode
    assert made.hear("c", 1.0, 0.0) == {}
    assert made.hear("c", 0.0, 0.0)["c"] == EQUAL, "nothing was heard of it lately: it may be as quick as the others"
    assert made.remove("a")["c"] == NOISY, "two are too few to say which is wrong"


def test_the_router_gives_the_noisy_one_its_share_and_follows_a_drift() -> None:
    tracker = LoadTracker()
    measured = {"a": EQUAL, "b": EQUAL, "c": NOISY}
    prefill = {WorkerTraits(name, 4096, 16, 1000, 8, times, kind="x"): True for name, times in measured.items()}
    tracker.update_pools(prefill, {WorkerTraits("d", 4096, 16, 4000, 64, EQUAL): True}, {})

    def placed(name: str) -> str | None:
        placement = tracker.place(RoutingRequest(512, 16))
        assert isinstance(placement, Placement)
        tracker.reserve(name, placement.prefill, placement.decode, 512)
        return placement.prefill

    assert {placed(f"first-{n}") for n in range(3)} == {"a", "b", "c"}
    for n in range(3):
        tracker.release(f"first-{n}")
    tracker.pace("a", 2.0, 0.0)  # it became slow
    assert {placed(f"then-{n}") for n in range(2)} == {"b", "c"}
    assert tracker.prefill_workers.prefill_seconds_of("a", 512) == 0.02
