"""Asks the policy of each pool what its size should be, and follows it, or only says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.api import PoolTarget
from cluster.config_sections import AutoscalerConfig
from cluster.scaling_policy import Decision, PoolPolicy, PoolSignals, ScalingRules

logger = logging.getLogger(__name__)


class Scalable(Protocol):
    """What is scaled: the engine."""

    def signals(self) -> dict[str, PoolSignals]:
        """Each pool as it is now, by role."""
        ...

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """Give pools new targets."""
        ...


def policies_of(config: AutoscalerConfig, clock: Callable[[], float]) -> dict[str, PoolPolicy]:
    """A policy for each pool: prefill goes by the time to the first token, decode by the time between tokens."""
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
        self._said: dict[str, tuple[int, int]] = {}

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
            change = (signals.target, decision.target)
            if decision.target == signals.target:
                continue
            if not self._dry_run:
                self._engine.scale({role: decision.target})
            elif self._said.get(role) == change:
                continue
            self._said[role] = change
            verb = "would go" if self._dry_run else "goes"
            self._report(f"the {role} pool {verb} from {change[0]} to {change[1]} workers: {decision.why}")
        return decisions
