"""The real engine over simulated workers that have a token for every stream each step: what doors are measured with."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from benchmarks.simulation.hardware import Hardware
from benchmarks.simulation.workers import SimulatedWorker
from cluster.api import ModelInfo
from cluster.gateway.engine import ServingEngine
from workers.runner.step_times import StepTimes

E = TypeVar("E", bound=ServingEngine)


async def start_simulated_engine(streams: int, step_s: float, num_prefill: int, make: type[E]) -> tuple[E, ModelInfo]:
    """An engine that has started, and what its model is like.

    Args:
        streams: sequences that its one decode worker has room for, twice.
        step_s: seconds of a decode step.
        num_prefill: prefill workers, each of which computes one prompt at a time.
        make: makes the engine.
    """
    times = StepTimes(prefill=((1, 1e-4), (1000, 1e-4)), decode=((1, step_s), (streams, step_s)))
    hardware = Hardware(
        times, num_blocks=64 * streams, max_num_seqs=2 * streams, steps_at_once=1, kv_bytes_per_token=1, load_s=0.0
    )
    fabric: dict[str, SimulatedWorker] = {}
    places = {
        role: [partial(SimulatedWorker, f"{role}-{i}", role, hardware, fabric) for i in range(count)]
        for role, count in (("prefill", num_prefill), ("decode", 1))
    }
    engine = make(places["prefill"], places["decode"], max_queue=100_000)
    await engine.start()
    return engine, ModelInfo("simulated", "llama", "bfloat16", hardware.max_model_len, 4096, (), False)
