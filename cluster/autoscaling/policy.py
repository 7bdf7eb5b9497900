"""How many workers a pool should have: a decision on plain numbers, with a clock that is given.

The rule is that of Kubernetes' HorizontalPodAutoscaler (wanted = ceil(workers · pressure)), with its stabilisation
windows, made for latencies: these do not fall in proportion to the workers, so that steps are small and far between;
nor below what an idle worker needs, so that what a pool has to do decides on when it shrinks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolSignals:
    """A pool at one moment.

    Attributes:
        target: workers that it is to have.
        ready: workers that serve.
        minimum: workers that it must have.
        maximum: workers that it may have.
        latency_s: what requests have lately experienced of it: time to the first token, or between tokens. None: there
            were none.
        queued: requests that wait for room in it.
        occupancy: the share of its KV blocks, or of its batch, that is taken; the larger one.
        busy: the share of the time that its workers compute prompts; 1 is no reason to grow, if nobody waits.
        local_ttft_s: of a decode pool: time to the first token of the prompts that it computed. None: there were none.
        absent: of each place of the target without a worker that serves, its group, and for how many seconds.
    """

    target: int
    ready: int
    minimum: int
    maximum: int
    latency_s: float | None
    queued: int
    occupancy: float
    busy: float = 0.0
    local_ttft_s: float | None = None
    absent: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ScalingRules:
    """When a pool grows and shrinks. Pressure 1 is as much as it should bear.

    Attributes:
        objective_s: the latency that is pressure 1.
        occupancy: that is pressure 1.
        queue_per_worker: waiting requests for each worker that are pressure 1.
        grow_above: pressure above which it grows.
        shrink_below: pressure below which it shrinks, latency left out; lower, so that one worker less is still enough.
        calm_latency: share of the objective that the latency must be below for the pool to shrink.
        grow_after_s: the pressure must have been high for so long.
        shrink_after_s: the pressure must have been low for so long.
        cooldown_s: from one change to the next.
        grow_step: workers added at once, at most.
        shrink_step: workers taken away at once, at most.
        start_patience_s: a place that has had no worker for so long is not waited for any more.
        local_ttft_s: time to the first token that is pressure 1, of prompts that a decode pool computes.
    """

    objective_s: float
    occupancy: float = 0.9
    queue_per_worker: float = 4.0
    grow_above: float = 1.0
    shrink_below: float = 0.5
    calm_latency: float = 0.8
    grow_after_s: float = 15.0
    shrink_after_s: float = 300.0
    cooldown_s: float = 30.0
    grow_step: int = 2
    shrink_step: int = 1
    start_patience_s: float = 300.0
    local_ttft_s: float = math.inf


@dataclass(frozen=True)
class Decision:
    """What a pool's target should be, and why."""

    target: int
    why: str


class PoolPolicy:
    """Decides for one pool, again and again.

    Args:
        rules: when it grows and shrinks.
        clock: seconds.
    """

    def __init__(self, rules: ScalingRules, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._began: float | None = None
        self._changed = -math.inf
        self._wanted: deque[tuple[float, int]] = deque()

    def decide(self, signals: PoolSignals) -> Decision:
        """What to do now. A target that differs from the pool's is taken to be followed."""
        now = self._clock()
        self._began = now if self._began is None else self._began
        pressure, cause = self._pressure(signals)
        self._remember(now, self._want(signals, pressure))
        target, why = self._settled(now, signals, f"{cause}, pressure {pressure:.2f}")
        if target != signals.target:
            self._changed = now
        return Decision(target, why)

    def stuck(self, signals: PoolSignals) -> list[str]:
        """The group of each place whose worker does not start; it counts for nothing, and holds up nothing."""
        return [group for group, seconds in signals.absent if seconds >= self._rules.start_patience_s]

    def _pressure(self, signals: PoolSignals) -> tuple[float, str]:
        """The highest of all pressures, and what it comes from."""
        rules, latency_s, ttft_s = self._rules, signals.latency_s or 0.0, signals.local_ttft_s or 0.0
        return max(
            (latency_s / rules.objective_s, f"latency {latency_s:.3g} s of {rules.objective_s:.3g} s"),
            (ttft_s / rules.local_ttft_s, f"first token after {ttft_s:.3g} s of {rules.local_ttft_s:.3g} s"),
            (signals.occupancy / rules.occupancy, f"{signals.occupancy:.0%} taken of {rules.occupancy:.0%}"),
            (self._queue_pressure(signals), f"{signals.queued} requests wait"),
        )

    def _queue_pressure(self, signals: PoolSignals) -> float:
        return signals.queued / max(1, signals.ready) / self._rules.queue_per_worker

    def _want(self, signals: PoolSignals, pressure: float) -> int:
        """Workers for this pressure, with hysteresis, and within the bounds."""
        rules, stuck = self._rules, len(self.stuck(signals))
        target = signals.target - stuck
        latency = max(
            (signals.latency_s or 0.0) / rules.objective_s, (signals.local_ttft_s or 0.0) / rules.local_ttft_s
        )
        work = max(signals.occupancy / rules.occupancy, signals.busy, self._queue_pressure(signals))
        if pressure > rules.grow_above:
            wanted = min(math.ceil(max(1, target) * pressure / rules.grow_above), target + rules.grow_step)
        elif work < rules.shrink_below and latency < rules.calm_latency and target > 1:
            needed = math.floor(target * work / rules.grow_above) + 1  # so many stay below the upper threshold
            wanted = max(min(needed, target), target - rules.shrink_step)
        else:
            wanted = target
        return min(max(wanted + stuck, signals.minimum), signals.maximum)

    def _remember(self, now: float, wanted: int) -> None:
        self._wanted.append((now, wanted))
        longest = max(self._rules.grow_after_s, self._rules.shrink_after_s)
        while self._wanted[0][0] < now - longest:
            self._wanted.popleft()

    def _settled(self, now: float, signals: PoolSignals, why: str) -> tuple[int, str]:
        """What was wanted throughout the window of its direction."""
        target, rules = signals.target, self._rules
        if not signals.minimum <= target <= signals.maximum:
            return min(max(target, signals.minimum), signals.maximum), "out of its bounds"
        wanted = self._wanted[-1][1]
        if wanted == target:
            return target, why
        stuck = len(self.stuck(signals))
        if signals.ready + stuck < target:
            return target, f"{why}; {signals.ready} of {target} workers are ready"
        if wanted > target and stuck > signals.ready + rules.grow_step:
            return target, f"{why}; {stuck} of {target} workers do not start"
        after_s = rules.grow_after_s if wanted > target else rules.shrink_after_s
        within = [w for at, w in self._wanted if at > now - after_s] or [wanted]
        steady = min(within) if wanted > target else max(within)
        began = self._began if self._began is not None else now
        if (steady > target) != (wanted > target) or steady == target or now - began < after_s:
            return target, f"{why}; not for {after_s:g} s yet"
        if now - self._changed < rules.cooldown_s:
            return target, f"{why}; the last change was {now - self._changed:.0f} s ago"
        return steady, why
