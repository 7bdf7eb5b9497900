"""The autoscaler over real pools: simulated workers for hours of load, and workers in this process for seconds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.simulation.virtual_time import run_simulated
from benchmarks.simulation.workers import Fabric, Hardware, SimulatedWorker
from cluster.api import PoolTarget
from cluster.autoscaling.autoscaler import Autoscaler, policies_of, share_change
from cluster.autoscaling.policy import PoolSignals
from cluster.clock import now
from cluster.config.schema import AutoscalerConfig
from cluster.gateway.engine import ServingEngine
from cluster.pools.groups import PoolLimits
from fleet import prompt
from made_requests import engine_request
from workers.runner.step_times import StepTimes
from workers.sampling_params import SamplingParams

CAPABILITY = StepTimes(prefill=((100, 0.1), (10_000, 10.0)), decode=((1, 0.02), (4, 0.03), (8, 0.06)))
HARDWARE = Hardware(CAPABILITY, max_num_seqs=8, load_s=20.0, steps_at_once=1)


def autoscaler_of(engine: ServingEngine, config: AutoscalerConfig, lines: list[str]) -> Autoscaler:
    return Autoscaler(
        engine,
        policies_of(config, now),
        interval_s=config.interval_s,
        dry_run=config.mode == "dry-run",
        report=lambda line: lines.append(f"{now():.0f} {line}"),
    )


class Day:
    """Quiet hours, a busy one, quiet hours again."""

    def __init__(self, mode: str, *phases: tuple[float, float]) -> None:
        """`phases`: each with its end, and requests in a second."""
        self._phases = phases
        self.lines: list[str] = []
        self.sizes: list[tuple[float, int, int]] = []
        self.failures: list[Exception] = []
        self.finished = 0
        self._config = AutoscalerConfig(mode=mode, ttft_s=1.0, itl_s=0.04)

    async def run(self) -> None:
        fabric: Fabric = {}
        places = {
            role: [partial(SimulatedWorker, f"{role}-{i}", role, HARDWARE, fabric) for i in range(6)]
            for role in ("prefill", "decode")
        }
        limits = {"prefill": PoolLimits(1), "decode": PoolLimits(1)}
        engine = ServingEngine(places["prefill"], places["decode"], max_queue=10_000, limits=limits)
        await engine.start()
        looking = asyncio.ensure_future(autoscaler_of(engine, self._config, self.lines).run())
        rng, began = random.Random(3), now()
        requests = set()
        for until, per_s in self._phases:
            while now() - began < until:
                await asyncio.sleep(rng.expovariate(per_s))
                task = asyncio.ensure_future(self._request(engine))
                requests.add(task)
                task.add_done_callback(requests.discard)
                prefill, decode = engine.scale({})
                self.sizes.append((now() - began, prefill.target, decode.target))
        while requests:
            await asyncio.wait(list(requests))
        looking.cancel()
        await engine.stop()

    async def _request(self, engine: ServingEngine) -> None:
        sampling = SamplingParams(max_tokens=60, seed=60, ignore_eos=True)
        try:
            async for _ in engine.generate(engine_request("r", (0,) * 600, sampling, 600.0)):
                pass
            self.finished += 1
        except Exception as error:
            self.failures.append(error)


@pytest.mark.slow
def test_a_busy_hour_is_met_and_what_it_took_is_given_back():
    day = Day("on", (1200.0, 0.1), (3000.0, 3.0), (9000.0, 0.1))
    run_simulated(day.run())
    quiet, busy, after = (
        [size[1:] for size in day.sizes if begin <= size[0] < end]
        for begin, end in ((0, 1200), (1800, 3000), (7200, 9000))
    )
    assert set(quiet) == {(1, 1)}
    assert min(busy) >= (2, 2), "1.8 prefill workers' work"
    assert set(after) == {(1, 1)}
    assert day.failures == []
    assert day.finished == len(day.sizes) > 5_000
    assert len(day.lines) <= 20, "it does not swing: " + "; ".join(day.lines)


def test_a_dry_run_says_what_it_would_do_and_does_nothing():
    day = Day("dry-run", (600.0, 0.1), (900.0, 3.0), (1500.0, 0.1))
    run_simulated(day.run())
    assert {size[1:] for size in day.sizes} == {(1, 1)}
    assert any("the prefill pool would go from 1 to" in line and "pressure" in line for line in day.lines)
    assert not any(" goes " in line for line in day.lines)
    assert len(day.lines) < 20, "once for each thing it would do"


GROUPS = (
    PoolTarget("decode", 1, 1, 3, "spot"),
    PoolTarget("decode", 2, 1, 2, "own"),
    PoolTarget("decode", 1, 0, 9, "far"),
)


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (4, {}),
        (5, {"decode.spot": 2}),
        (8, {"decode.spot": 3, "decode.far": 3}),
        (99, {"decode.spot": 3, "decode.far": 9}),
        (3, {"decode.far": 0}),
        (2, {"decode.far": 0, "decode.own": 1}),
        (1, {"decode.far": 0, "decode.own": 1}),
    ],
)
def test_a_pool_grows_in_its_first_group_with_room_and_shrinks_in_its_last(target, changes):
    assert share_change(GROUPS, target) == changes


def test_a_pool_grows_last_where_a_worker_does_not_start():
    assert share_change(GROUPS, 6, ["spot"]) == {"decode.far": 3}
    assert share_change(GROUPS, 99, ["spot", "far"]) == {"decode.spot": 3, "decode.far": 9}
    assert share_change(GROUPS, 3, ["spot"]) == {"decode.far": 0}, "it shrinks as ever"


def test_a_group_out_of_its_bounds_moves_towards_them_only():
    too_many = [PoolTarget("decode", 5, 1, 3, "a"), PoolTarget("decode", 1, 1, 3, "b")]
    assert share_change(too_many, 7) == {"decode.b": 2}
    assert share_change(too_many, 5) == {"decode.a": 3}


class Groups:
    """Pools that follow their targets at once, under a latency that is given."""

    def __init__(self, *targets: PoolTarget) -> None:
        self.targets, self.latency_s = list(targets), 0.0

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        self.targets = [replace(t, target=targets.get(t.key, t.target)) for t in self.targets]
        return self.targets

    def signals(self) -> dict[str, PoolSignals]:
        target = sum(t.target for t in self.targets)
        return {"decode": PoolSignals(target, target, 1, 14, self.latency_s, 0, 0.0)}


@pytest.mark.parametrize("mode", ["on", "dry-run"])
def test_it_says_which_groups_change(mode):
    pools, lines, time_s = Groups(*GROUPS), [], 0.0
    config = AutoscalerConfig(mode=mode, itl_s=1.0, grow_after_s=0.0, shrink_after_s=0.0, cooldown_s=0.0, grow_step=4)
    autoscaler = Autoscaler(
        pools,
        policies_of(config, lambda: time_s),
        interval_s=1.0,
        dry_run=mode == "dry-run",
        report=lambda line: lines.append(line.partition(":")[0]),
    )
    for pools.latency_s in (2.0, 2.0, 0.0):
        autoscaler.look()
        time_s += 1.0
    sizes = {t.group: t.target for t in pools.targets}
    if mode == "on":
        assert lines == [
            "the decode pool goes from 4 to 8 workers (spot from 1 to 3, far from 1 to 3)",
            "the decode pool goes from 8 to 12 workers (far from 3 to 7)",
            "the decode pool goes from 12 to 11 workers (far from 7 to 6)",
        ]
        assert sizes == {"spot": 3, "own": 2, "far": 6}
    else:
        assert lines == [
            "the decode pool would go from 4 to 8 workers (spot from 1 to 3, far from 1 to 3)",
            "the decode pool would go from 4 to 3 workers (far from 1 to 0)",
        ], "once for each thing it would do"
        assert sizes == {"spot": 1, "own": 2, "far": 1}


async def test_load_adds_a_decode_worker_and_idleness_takes_it_back(make_fleet, expected):
    fleet = await make_fleet(1, 2, limits={"prefill": PoolLimits(1), "decode": PoolLimits(1)}, max_num_seqs=2)
    config = AutoscalerConfig(
        mode="on", ttft_s=1000.0, itl_s=1000.0, interval_s=0.05, grow_after_s=0.1, shrink_after_s=0.5, cooldown_s=0.1
    )
    lines: list[str] = []
    looking = asyncio.ensure_future(autoscaler_of(fleet.engine, config, lines).run())

    def serving(number: int) -> bool:
        return [w.state for w in fleet.engine.workers() if w.role == "decode"] == ["ready"] * number

    async def client(number: int) -> None:
        while not crowded.is_set():
            assert await fleet.run(prompt(20, seed=number), 60) == answers[number]

    answers = [expected(prompt(20, seed=number), 60) for number in range(6)]
    crowded = asyncio.Event()
    clients = [asyncio.ensure_future(client(number)) for number in range(6)]
    await fleet.until(lambda _: serving(2))
    crowded.set()
    await asyncio.gather(*clients)
    await fleet.until(lambda _: serving(1))
    looking.cancel()
    assert "the decode pool goes from 1 to 2 workers" in lines[0]
    assert "the decode pool goes from 2 to 1 workers" in lines[-1]
    await fleet.until_idle()


async def test_an_autoscaler_that_fails_goes_on(make_fleet):
    fleet = await make_fleet()
    config = replace(AutoscalerConfig(), interval_s=0.01)
    autoscaler, looks = autoscaler_of(fleet.engine, config, []), 0

    def fail() -> dict:
        nonlocal looks
        looks += 1
        raise RuntimeError("a defect")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet.engine, "signals", fail)
        running = asyncio.ensure_future(autoscaler.run())
        await fleet.until(lambda _: looks > 2)
    assert not running.done()
    running.cancel()
