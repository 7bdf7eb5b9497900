"""The pools in the numbers by which their size is decided."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from cluster.api import PoolTarget
from cluster.autoscaling.policy import PoolSignals
from cluster.pools.replica import Replica

_FULL = 0.85


def pool_signals(
    replicas: Iterable[Replica],
    targets: Iterable[PoolTarget],
    latencies: Mapping[str, float | None],
    prompt_work: Mapping[str, float],
    queued: int,
    local_ttft_s: float | None = None,
) -> dict[str, PoolSignals]:
    """Each pool as it is now, by role.

    Args:
        replicas: of both pools.
        targets: of all groups of both.
        latencies: what requests have lately experienced of each, seconds.
        prompt_work: seconds of computing prompts in a second, of all workers of each pool together.
        queued: requests that wait at the gateway, for whichever pool has no room.
        local_ttft_s: time to the first token of prompts that decode workers have lately computed.
    """
    ready: dict[str, list[Replica]] = {"prefill": [], "decode": []}
    absent: dict[str, list[Replica]] = {"prefill": [], "decode": []}
    now = time.monotonic()
    for replica in replicas:
        if replica.state == "ready":
            ready[replica.handle.role].append(replica)
        elif not replica.serves:
            absent[replica.handle.role].append(replica)
    occupancy = {role: _occupancy(role, pool) for role, pool in ready.items()}
    prefill_is_busy = any(replica.load.waiting_tokens for replica in ready["prefill"])
    waits_for = "prefill" if prefill_is_busy and occupancy["decode"] < _FULL else "decode"
    groups: dict[str, list[PoolTarget]] = {role: [] for role in ready}
    for target in targets:
        groups[target.role].append(target)
    return {
        role: PoolSignals(
            target=sum(group.target for group in own),
            ready=len(ready[role]),
            minimum=max(sum(group.min_replicas for group in own), int(any(group.target for group in own))),
            maximum=sum(group.max_replicas for group in own),
            latency_s=latencies[role],
            queued=queued if role == waits_for else 0,
            occupancy=occupancy[role],
            busy=min(1.0, prompt_work[role] / max(1, len(ready[role]))),
            local_ttft_s=local_ttft_s if role == "decode" else None,
            absent=tuple((each.group, now - each.absent_since) for each in absent[role]),
        )
        for role, own in groups.items()
    }


def _occupancy(role: str, pool: Sequence[Replica]) -> float:
    """The share of a pool's KV blocks that is taken, or of its batch if that is more; of prompts a queue is usual."""
    blocks = sum(replica.load.total_blocks for replica in pool)
    taken = sum(replica.load.total_blocks - replica.load.free_blocks for replica in pool)
    slots = sum(replica.info.max_num_seqs for replica in pool if replica.info is not None)
    running = sum(replica.load.running for replica in pool) if role == "decode" else 0
    return max(taken / blocks if blocks else 0.0, running / slots if slots else 0.0)
