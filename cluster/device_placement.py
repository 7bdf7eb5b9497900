"""Which devices the workers run on, and how they share them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from cluster.config.groups import WorkerGroup, groups_of
from cluster.config.schema import PoolConfig, ServiceConfig
from workers.errors import ConfigError

GPU_MEMORY_UTILIZATION = 0.9
"""The share of a GPU that its workers use together when nobody has said."""

_BLOCK_SIZE = {"cpu": 16, "cuda": 64}
_PRECISION = 10_000  # Ray counts GPUs in ten-thousandths


@dataclass(frozen=True)
class Placement:
    """Where a group's workers run: what its settings leave open, decided.

    Attributes:
        device: cpu or cuda.
        num_gpus: that Ray reserves for each rank of a worker.
        gpu_memory_utilization: share of a GPU's memory that each rank may use.
        block_size: tokens in a KV block.
        gpu_by_rank: rank i runs on GPU i: Ray might put two ranks that take a part of a GPU each on the same one.
    """

    device: str
    num_gpus: float
    gpu_memory_utilization: float
    block_size: int
    gpu_by_rank: bool = False


def place_groups(config: ServiceConfig, gpus: float | None) -> dict[str, Placement]:
    """Decide for every group of both pools, by key.

    A group on `auto` takes GPUs if every rank of every worker that wants one gets its `num_gpus`. Where that is not set
    it is 1, or, where there are GPUs but fewer than ranks, an equal part, with the same part of the memory. Workers of
    several ranks share GPUs only where each has a rank on every GPU. What counts are the workers to begin with.

    Args:
        config: the service's.
        gpus: that the Ray cluster has; None: there is no Ray, all workers are in this process, and `auto` is the CPU.

    Raises:
        ConfigError: a group on `cuda`, or one that names its `num_gpus`, does not get them.
    """
    groups = groups_of(config)
    forced = [group for group in groups if group.settings.asks_for_gpus]
    willing = [group for group in groups if group in forced or _may_take_gpus(group, gpus)]
    if gpus is None:
        on_gpu, part = forced, 1 / max(1, sum(group.ranks for group in forced))
    else:
        on_gpu, part = _fitting(willing, forced, gpus)
    # Of one size where nobody says otherwise, because blocks travel as they are.
    block_size = _BLOCK_SIZE["cuda" if all(group in on_gpu for group in groups if group.ranks) else "cpu"]
    return {
        group.key: _placement(group.settings, "cuda" if group in on_gpu else "cpu", part, block_size)
        for group in groups
    }


def _may_take_gpus(group: WorkerGroup, gpus: float | None) -> bool:
    """Whether a group is on `auto`, and has workers to begin with, or there are GPUs for those that come later."""
    return group.settings.device == "auto" and (group.ranks > 0 or (gpus or 0.0) >= 1)


def _fitting(willing: list[WorkerGroup], forced: list[WorkerGroup], gpus: float) -> tuple[list[WorkerGroup], float]:
    """The groups that go to the GPUs, and the part of one that a worker gets where its settings do not say."""
    for groups in (willing, forced):
        part = _part(groups, gpus)
        if part is not None:
            return groups, part
        if gpus >= 1 and any(group.settings.tensor_parallel_size > 1 for group in groups):
            raise ConfigError(_too_few_for_ranks(groups, gpus))
    raise ConfigError(
        f"the workers need {_needed(forced):g} GPUs, the Ray cluster has {gpus:g}; set device to cpu, or num_gpus "
        "below 1 so that workers share a GPU"
    )


def _needed(groups: Collection[WorkerGroup]) -> float:
    """GPUs for so many ranks, one each where nothing is said."""
    return sum(g.ranks * (1.0 if g.settings.num_gpus is None else g.settings.num_gpus) for g in groups)


def _too_few_for_ranks(groups: Collection[WorkerGroup], gpus: float) -> str:
    sizes = " and ".join(f"{g.settings.replicas} × {g.settings.tensor_parallel_size} for {g.key}" for g in groups)
    return (
        f"the workers' ranks need {_needed(groups):g} GPUs ({sizes}), the Ray cluster has {gpus:g}; lower replicas or "
        "tensor_parallel_size, set device to cpu, or let workers share all GPUs: tensor_parallel_size equal to their "
        "number, and num_gpus below 1"
    )


def _part(groups: Collection[WorkerGroup], gpus: float) -> float | None:
    """The part of a GPU for each rank whose `num_gpus` is open; None when the GPUs do not suffice."""
    said = [(group.settings.num_gpus, group) for group in groups]
    left = gpus - sum(group.ranks * num for num, group in said if num is not None)
    ranks = sum(group.ranks for num, group in said if num is None)
    if left < 0:
        return None
    part = 1.0
    if ranks > left:
        if left < 1:
            return None
        part = math.floor(_PRECISION / math.ceil(ranks / math.floor(left))) / _PRECISION
    sizes = {group.settings.tensor_parallel_size for _, group in said if group.ranks}
    shared = {g.settings.tensor_parallel_size for num, g in said if g.ranks and (part if num is None else num) < 1}
    if max(shared, default=1) > 1 and sizes != {math.floor(gpus)}:
        return None
    return part


def _placement(pool: PoolConfig, device: str, part: float, block_size: int) -> Placement:
    num_gpus = 0.0 if device == "cpu" else part if pool.num_gpus is None else pool.num_gpus
    shared = num_gpus if 0 < num_gpus < 1 else 1.0
    utilization = pool.gpu_memory_utilization
    return Placement(
        device,
        num_gpus,
        utilization if utilization is not None else GPU_MEMORY_UTILIZATION * shared,
        pool.block_size if pool.block_size is not None else block_size,
        gpu_by_rank=pool.tensor_parallel_size > 1 and 0 < num_gpus < 1,
    )
