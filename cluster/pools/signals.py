"""The pools in the numbers by which their size is decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cluster.api import PoolTarget
from cluster.pools.member import Member
from cluster.scaling_policy import PoolSignals

_FULL = 0.85


def pool_signals(
    members: Iterable[Member],
    targets: Iterable[PoolTarget],
    latencies: Mapping[str, float | None],
    prefill_work: float,
    queued: int,
) -> dict[str, PoolSignals]:
    """Each pool as it is now, by role.

    Args:
        members: of both pools.
        targets: of both.
        latencies: what requests have lately experienced of each, seconds.
        prefill_work: seconds of computing prompts in a second, of all prefill workers together.
        queued: requests that wait at the gateway, for whichever pool has no room.
    """
    ready: dict[str, list[Member]] = {"prefill": [], "decode": []}
    for member in members:
        if member.state == "ready":
            ready[member.handle.role].append(member)
    occupancy = {role: _occupancy(role, pool) for role, pool in ready.items()}
    prefill_is_busy = any(member.load.waiting_tokens for member in ready["prefill"])
    waits_for = "prefill" if prefill_is_busy and occupancy["decode"] < _FULL else "decode"
    return {
        target.role: PoolSignals(
            target=target.target,
            ready=len(ready[target.role]),
            minimum=target.min_replicas,
            maximum=target.max_replicas,
            latency_s=latencies[target.role],
            queued=queued if target.role == waits_for else 0,
            occupancy=occupancy[target.role],
            busy=min(1.0, prefill_work / max(1, len(ready["prefill"]))) if target.role == "prefill" else 0.0,
        )
        for target in targets
    }


def _occupancy(role: str, pool: Sequence[Member]) -> float:
    """The share of a pool's KV blocks that is taken, or of its batch if that is more; of prompts a queue is usual."""
    blocks = sum(member.load.total_blocks for member in pool)
    taken = sum(member.load.total_blocks - member.load.free_blocks for member in pool)
    slots = sum(member.info.max_num_seqs for member in pool if member.info is not None)
    running = sum(member.load.running for member in pool) if role == "decode" else 0
    return max(taken / blocks if blocks else 0.0, running / slots if slots else 0.0)
