"""The formulas against cases that can be checked by hand, and against queues that are played through."""

import heapq
import math
import random

import pytest

from cluster.planning.queueing import Wait, erlang_c, poisson_at_most, wait_of


def test_erlang_c_by_hand() -> None:
    assert erlang_c(1, 0.6) == pytest.approx(0.6), "one server: the share of time that it is busy"
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(3, 2.0) == pytest.approx(4 / 9)
    assert erlang_c(2, 2.0) == erlang_c(2, 5.0) == 1.0
    assert 0.0 < erlang_c(1000, 900.0) < 0.01, "large pools neither overflow nor wait"


def test_the_wait_for_one_server_is_pollaczek_and_khinchines() -> None:
    constant, exponential = wait_of(1, 0.8, 1.0, 0.0), wait_of(1, 0.8, 1.0, 1.0)
    assert constant is not None
    assert exponential is not None
    assert constant.mean_s == pytest.approx(0.8 / (2 * 0.2))
    assert exponential.mean_s == pytest.approx(0.8 / 0.2)
    assert exponential.within(2.0) == pytest.approx(1.0 - 0.8 * math.exp(-0.2 * 2.0)), "M/M/1 exactly"


def test_a_wait_without_an_end_and_one_that_nobody_has() -> None:
    assert wait_of(2, 4.0, 0.5, 0.0) is None
    nobody = wait_of(2, 0.0, 0.5, 0.0)
    assert nobody is not None
    assert (nobody.mean_s, nobody.within(0.0), nobody.quantile(0.99)) == (0.0, 1.0, 0.0)


def test_a_quantile_is_what_so_many_stay_within() -> None:
    wait = Wait(0.5, 4.0)
    assert wait.quantile(0.4) == 0.0
    for share in (0.6, 0.9, 0.99):
        assert wait.within(wait.quantile(share)) == pytest.approx(share)
    assert wait.within(-0.001) == 0.0


@pytest.mark.parametrize("mean", [0.0, 0.5, 20.0, 1999.0, 2001.0, 50_000.0])
def test_the_share_of_a_poisson_variable(mean: float) -> None:
    assert poisson_at_most(-1, mean) == 0.0
    assert poisson_at_most(mean + 8 * mean**0.5 + 20, mean) == pytest.approx(1.0)
    if mean > 10:
        assert poisson_at_most(mean, mean) == pytest.approx(0.5, abs=0.6 / mean**0.5)
    assert poisson_at_most(0, 0.5) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (3, 2.4)])
def test_the_wait_of_a_queue_that_is_played_through(servers: int, load: float) -> None:
    waits = _play(servers, per_second=load, service_s=1.0, number=60_000)
    wait = wait_of(servers, load, 1.0, 0.0)
    assert wait is not None
    mean = sum(waits) / len(waits)
    assert wait.mean_s == pytest.approx(mean, rel=0.2)
    late = sum(value > 3.0 for value in waits) / len(waits)
    assert 1.0 - wait.within(3.0) == pytest.approx(late, abs=0.03)


def _play(servers: int, per_second: float, service_s: float, number: int) -> list[float]:
    rng, at, waits = random.Random(1), 0.0, []
    free = [0.0] * servers
    for _ in range(number):
        at += rng.expovariate(per_second)
        begins = max(at, free[0])
        heapq.heapreplace(free, begins + service_s)
        waits.append(begins - at)
    return waits
