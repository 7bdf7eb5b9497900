"""Asks the policy of each pool what its size should be, and follows it, or only says so.

What a worker of a group costs is not to be measured, so the order in which the configuration names the groups of a pool
is that of preference: a pool grows in the first group that has a place left, and shrinks in the last that may.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from cluster.api import PoolTarget
from cluster.autoscaling.policy import Decision, PoolPolicy, PoolSignals, ScalingRules
from cluster.config.schema import AutoscalerConfig

logger = logging.getLogger(__name__)


class Scalable(Protocol):
    """What is scaled: the engine."""

    def signals(self) -> dict[str, PoolSignals]:
        """Each pool as it is now, by role."""
        ...

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """Give groups new targets, by key. Returns those of all, in the order of the configuration."""
        ...


def policies_of(config: AutoscalerConfig, clock: Callable[[], float]) -> dict[str, PoolPolicy]:
    """A policy for each pool.

    Prefill goes by the time to the first token, decode by the time between tokens, and by the former, too, where it
    computes prompts.
    """
    return {
        role: PoolPolicy(
            ScalingRules(
                objective_s=objective_s,
                occupancy=config.occupancy,
                queue_per_worker=config.queue_per_worker,
                shrink_below=config.shrink_below,
                grow_after_s=config.grow_after_s,
                shrink_after_s=config.shrink_after_s,
                cooldown_s=config.cooldown_s,
                grow_step=config.grow_step,
                shrink_step=config.shrink_step,
                start_patience_s=config.start_patience_s,
                local_ttft_s=config.ttft_s,
            ),
            clock,
        )
        for role, objective_s in (("prefill", config.ttft_s), ("decode", config.itl_s))
    }


class Autoscaler:
    """Looks at the pools now and then.

    Args:
        engine: whose pools.
        policies: by role.
        interval_s: from one look to the next.
        dry_run: say what would be done, and do nothing.
        report: takes a line for each thing done, or that would be done.
    """

    def __init__(
        self,
        engine: Scalable,
        policies: Mapping[str, PoolPolicy],
        *,
        interval_s: float,
        dry_run: bool,
        report: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._policies = policies
        self._interval_s = interval_s
        self._dry_run = dry_run
        self._report = report
        self._said: dict[str, str] = {}

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                self.look()
            except Exception:  # a defect here must not end the service
                logger.exception("the autoscaler failed")

    def look(self) -> dict[str, Decision]:
        """Decide for each pool once, and follow the decisions unless this is a dry run."""
        decisions = {}
        for role, signals in self._engine.signals().items():
            decision = decisions[role] = self._policies[role].decide(signals)
            if decision.target != signals.target:
                self._change(role, decision, self._policies[role].stuck(signals))
        return decisions

    def _change(self, role: str, decision: Decision, stuck: Collection[str]) -> None:
        groups = [group for group in self._engine.scale({}) if group.role == role]
        now_held, changes = sum(group.target for group in groups), share_change(groups, decision.target, stuck)
        if not self._dry_run:
            self._engine.scale(changes)
        line = f"{now_held} to {decision.target} workers{_by_group(groups, changes)}"
        if self._dry_run and self._said.get(role) == line:
            return
        self._said[role] = line
        verb = "would go" if self._dry_run else "goes"
        self._report(f"the {role} pool {verb} from {line}: {decision.why}")


def share_change(groups: Sequence[PoolTarget], target: int, stuck: Collection[str] = ()) -> dict[str, int]:
    """What the groups of a pool are to have so that it has `target` workers, or as near to it as their bounds allow.

    Args:
        groups: of the pool, in the order of preference.
        target: of the pool.
        stuck: groups of which some worker does not start: the pool grows there last.

    Returns:
        By key, the targets that change.
    """
    change = target - sum(group.target for group in groups)
    changes: dict[str, int] = {}
    growing = sorted(groups, key=lambda group: group.group in stuck)
    for group in growing if change > 0 else reversed(groups):
        wanted = min(max(group.target + change, group.min_replicas), group.max_replicas)
        if change * (wanted - group.target) > 0:
            changes[group.key] = wanted
            change -= wanted - group.target
    return changes


def _by_group(groups: Sequence[PoolTarget], changes: Mapping[str, int]) -> str:
    """Which groups change, where they have names."""
    moves = [f"{g.group} from {g.target} to {changes[g.key]}" for g in groups if g.group and g.key in changes]
    return f" ({', '.join(moves)})" if moves else ""
