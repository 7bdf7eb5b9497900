"""A service at one moment, in plain values: what the page and `baton top` show."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from cluster.api import ModelInfo
from cluster.gateway.engine import ServingEngine
from cluster.gateway.readiness import Readiness
from cluster.live.history import LiveHistory
from cluster.live.seconds import KEPT_S, STEP_S, quantile, values_of
from cluster.pools.replica import Replica

_LATELY_S = 30
_SHOWN_REQUESTS = 40


def snapshot(engine: ServingEngine, history: LiveHistory, model: ModelInfo, readiness: Readiness) -> dict[str, Any]:
    """Everything that there is to see, fit for JSON. Times are Unix time in seconds, durations seconds."""
    history.count_tokens()
    replicas = engine.pools.replicas
    requests = {live.number: live for live in (*history.under_way[-_SHOWN_REQUESTS:], *history.requests)}
    newest = sorted(requests.values(), key=lambda live: -live.number)[:_SHOWN_REQUESTS]
    return {
        "now": time.time(),
        "started": history.started,
        "model": {"name": model.name, "architecture": model.architecture, "max_model_len": model.max_model_len},
        "health": {"ready": readiness.health.ready, "reason": readiness.health.reason},
        "objectives": asdict(history.objectives),
        "totals": asdict(history.totals),
        "lately": lately(history),
        "queued": engine.num_queued,
        "running": engine.num_attempts,
        "states": dict(Counter(live.state for live in history.under_way)),
        "pools": [asdict(target) for target in engine.pools.targets()],
        "workers": [_worker(replica) for replica in replicas],
        "links": [
            {"prefill": replica.engine_id, "decode": peer, "bytes_per_s": link.bytes_per_s}
            for replica in replicas
            for peer, link in replica.links.items()
        ],
        "series": {"step_s": STEP_S, "kept_s": KEPT_S, **history.seconds.series()},
        "requests": [live.as_json() for live in newest],
        "handoffs": list(history.handoffs),
        "events": list(history.events),
    }


def lately(history: LiveHistory) -> dict[str, Any]:
    """The last half minute in a few numbers; rates are by second."""
    seconds = history.seconds.last(_LATELY_S)
    finished, failed = sum(s.finished for s in seconds), sum(s.failed for s in seconds)
    return {
        "window_s": _LATELY_S,
        "requests_per_s": finished / _LATELY_S,
        "good_per_s": sum(s.good for s in seconds) / _LATELY_S,
        "good_share": sum(s.good for s in seconds) / (finished + failed) if finished + failed else None,
        "tokens_per_s": sum(s.tokens for s in seconds) / _LATELY_S,
        "kv_bytes_per_s": sum(s.kv_bytes for s in seconds) / _LATELY_S,
        "ttft_p50_s": quantile(values_of(seconds, "ttft_s"), 0.5),
        "ttft_p90_s": quantile(values_of(seconds, "ttft_s"), 0.9),
        "tpot_p50_s": quantile(values_of(seconds, "tpot_s"), 0.5),
    }


def sample(engine: ServingEngine, history: LiveHistory) -> None:
    """Note how many wait, and how full the caches are; to be called every second."""
    history.count_tokens()
    second = history.seconds.current
    second.queued = engine.num_queued
    for role in ("prefill", "decode"):
        loads = [replica.load for replica in engine.pools.pool(role)]
        total = sum(load.total_blocks for load in loads)
        if total:
            second.kv_used[role] = 1.0 - sum(load.free_blocks for load in loads) / total


def _worker(replica: Replica) -> dict[str, Any]:
    status = replica.status()
    return {
        "id": status.engine_id,
        "name": status.engine_id.partition(".")[0],
        "role": status.role,
        "group": status.group,
        "state": status.state,
        "device": status.device,
        "backend": status.attention_backend,
        "block_size": status.block_size,
        "max_num_seqs": status.max_num_seqs,
        "load": asdict(status.load),
        "silent_s": max(0.0, time.monotonic() - replica.heard_at) if replica.heard_at else None,
        "restarts": replica.restarts,
        "unreachable": [*replica.unreachable_peers.values(), *replica.unsupported_reasons.values()],
    }
