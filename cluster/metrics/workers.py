"""What workers are doing, read off the engine when somebody asks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from cluster.gateway.engine import ServingEngine
from cluster.gateway.observers import EngineObserver
from cluster.metrics.reasons import worker_name
from cluster.metrics.registry import MetricsRegistry
from cluster.pools.replica import Replica

_STATES = ("starting", "ready", "stalled", "draining", "lost")


class WorkerMetrics(Collector):
    """Reads pools, workers, queue and links.

    Args:
        registry: where the metrics are.
        engine: whose workers they are.
    """

    def __init__(self, registry: MetricsRegistry, engine: ServingEngine) -> None:
        self._registry = registry
        self._engine = engine

    def collect(self) -> Iterable[Family]:
        """All of them, as they are now."""
        family, engine = self._registry.family, self._engine
        replicas = engine.pools.replicas
        loads = [(_labels(replica), replica.load) for replica in replicas]
        queued = {"role": "gateway"}, float(engine.num_queued)
        yield family("num_requests_running", [(labels, load.running) for labels, load in loads])
        yield family("num_requests_waiting", [queued, *((labels, load.waiting) for labels, load in loads)])
        used = [(labels, 1.0 - load.free_blocks / load.total_blocks) for labels, load in loads if load.total_blocks]
        yield family("kv_cache_usage_perc", used)
        yield family("kv_blocks", [(labels, load.total_blocks) for labels, load in loads])
        yield family("kv_blocks_free", [(labels, load.free_blocks) for labels, load in loads])
        for name, role in (("kv_blocks_granted", "decode"), ("kv_blocks_pinned", "prefill")):
            own = [(labels, load.reserved_blocks) for labels, load in loads if labels["role"] == role]
            yield family(name, own)
        yield family("kv_blocks_quarantined", [(labels, load.quarantined_blocks) for labels, load in loads])
        yield family("waiting_prompt_tokens", [(labels, load.waiting_tokens) for labels, load in loads])
        yield family("sequences_swapped", [(labels, load.preempted) for labels, load in loads])
        yield family("attempts_running", [({}, engine.num_attempts)])
        yield from self._heartbeats(replicas)
        yield from self._pools(replicas)
        yield from self._links(replicas)
        yield family("gateway_cpu_seconds", [({}, time.process_time())])

    def _heartbeats(self, replicas: list[Replica]) -> Iterable[Family]:
        now = time.monotonic()
        heard = [(_labels(replica), replica) for replica in replicas if replica.heard_at]
        yield self._registry.family("worker_heartbeats", [(labels, replica.num_heard) for labels, replica in heard])
        silences = [(labels, max(0.0, now - replica.heard_at)) for labels, replica in heard if replica.serves]
        yield self._registry.family("worker_silence_seconds", silences)

    def _pools(self, replicas: list[Replica]) -> Iterable[Family]:
        targets = self._engine.pools.targets()
        counts = Counter((replica.handle.role, replica.group, replica.state) for replica in replicas)
        groups = {(target.role, target.group): target.target for target in targets}
        states = [
            ({"role": role, "group": group, "state": state}, float(counts[role, group, state]))
            for role, group in groups
            for state in _STATES
        ]
        yield self._registry.family("workers", states)
        wanted = [({"role": role, "group": group}, float(target)) for (role, group), target in groups.items()]
        yield self._registry.family("workers_target", wanted)

    def _links(self, replicas: list[Replica]) -> Iterable[Family]:
        links = [
            ({"prefill": worker_name(replica.engine_id), "decode": worker_name(peer)}, link)
            for replica in replicas
            for peer, link in replica.links.items()
        ]
        speeds = [(pair, link.bytes_per_s) for pair, link in links]
        yield self._registry.family("link_bandwidth_bytes_per_second", speeds)
        yield self._registry.family("link_write_seconds", [(pair, link.write_s) for pair, link in links])


class WorkerLosses(EngineObserver):
    """Counts workers that were lost; one that has drained is not.

    Args:
        registry: where the metrics are.
    """

    def __init__(self, registry: MetricsRegistry) -> None:
        self._losses = registry.counters("worker_losses")
        self._draining: set[str] = set()

    def worker_state_changed(self, engine_id: str, role: str, state: str) -> None:
        """See `EngineObserver.worker_state_changed`."""
        if state == "draining":
            self._draining.add(engine_id)
        elif state == "ready":
            self._draining.discard(engine_id)
        elif state == "lost":
            if engine_id not in self._draining:
                self._losses.labels(role).inc()
            self._draining.discard(engine_id)


def _labels(replica: Replica) -> dict[str, str]:
    return {"engine": worker_name(replica.engine_id), "role": replica.handle.role}
