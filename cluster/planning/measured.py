"""What a planner is told of workers: from what they have measured of themselves, in a service or kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.api import WorkerStatus
from cluster.planning.terms import DecodeWorker, Fleet, PrefillWorker
from workers.errors import ConfigError
from workers.messages import Load
from workers.runner.step_times import StepTimes


def fleet_of(
    workers: Sequence[WorkerStatus], *, max_num_batched_tokens: int = 0, overhead_s: float = 0.0, tokens: int = 1024
) -> Fleet:
    """What one worker of each pool can do; of unlike ones the slowest counts.

    Args:
        workers: of a service that has loaded.
        max_num_batched_tokens: of its prefill pool; 0: every prompt is computed by itself.
        overhead_s: added to every first token.
        tokens: a prompt's length by which prefill workers are compared.

    Raises:
        ConfigError: no worker has measured how long prompts take, or none how long decode steps take.
    """
    measured = [worker.step_times.prefill for worker in workers if worker.role == "prefill"]
    may_prefill = [w for w in workers if w.step_times.prefill and (w.role == "prefill" or not any(measured))]
    may_decode = [w for w in workers if w.step_times.decode and w.role == "decode"]
    if not may_prefill or not may_decode:
        missing = "prefill" if not may_prefill else "decode"
        raise ConfigError(f"none of {len(workers)} workers says how long {missing} takes it: has the service loaded?")
    prefill = max(may_prefill, key=lambda worker: worker.step_times.prefill_seconds(tokens))
    decode = max(may_decode, key=lambda worker: step_seconds(worker.step_times)(_middle(worker), 0.0))
    return Fleet(
        PrefillWorker(prefill.step_times.prefill_seconds, max_num_batched_tokens, prefill.max_num_seqs),
        DecodeWorker(
            step_seconds(decode.step_times), max(1, decode.max_num_seqs), decode.load.total_blocks * decode.block_size
        ),
        overhead_s,
    )


def step_seconds(step_times: StepTimes) -> Callable[[float, float], float]:
    """Time of a decode step by its sequences, as a real number, and the tokens in their caches.

    Past the largest batch that was measured it goes on along the line through the last two: more sequences share the
    reading of the weights, so that a step does not take in proportion longer.
    """
    sizes = [size for size, _ in step_times.decode]

    def seconds(batch: float, kv_tokens: float) -> float:
        cache_s = step_times.decode_seconds(sizes[-1], kv_tokens) - step_times.decode_seconds(sizes[-1], 0.0)
        if batch >= sizes[-1] and len(sizes) > 1:
            low, high = sizes[-2:]
        else:
            low, high = int(batch), int(batch) + 1
        low_s, high_s = step_times.decode_seconds(low, 0.0), step_times.decode_seconds(high, 0.0)
        return max(low_s, low_s + (high_s - low_s) * (batch - low) / (high - low)) + cache_s

    return seconds


def read_workers(path: Path) -> list[WorkerStatus]:
    """Workers as `baton status --json` writes them: an object with a list "workers".

    Raises:
        ConfigError: the file cannot be read, or is not of that form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["workers"]
        return [worker_of(entry) for entry in entries]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has no workers as `baton status --json` writes them: {error!r}") from error


def worker_of(entry: Mapping[str, Any]) -> WorkerStatus:
    """One worker, from what `dataclasses.asdict` has made of it; what it does not have is as in a new one."""
    measured = entry["step_times"]
    prefill, decode = (tuple((int(n), float(s)) for n, s in measured[name]) for name in ("prefill", "decode"))
    return WorkerStatus(
        engine_id=entry["engine_id"],
        role=entry["role"],
        state=entry["state"],
        device=entry["device"],
        attention_backend=entry["attention_backend"],
        block_size=int(entry["block_size"]),
        load=Load(**entry["load"]),
        group=entry.get("group", ""),
        max_num_seqs=int(entry["max_num_seqs"]),
        step_times=StepTimes(prefill, decode, float(measured.get("kv_token_s", 0.0))),
    )


def _middle(worker: WorkerStatus) -> float:
    return max(1.0, worker.max_num_seqs / 2.0)
