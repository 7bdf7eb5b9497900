"""Which devices the workers run on, and how they share them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from cluster.config_sections import PoolConfig, ServiceConfig
from workers.errors import ConfigError

GPU_MEMORY_UTILIZATION = 0.9
"""The share of a GPU that its workers use together when nobody has said."""

_BLOCK_SIZE = {"cpu": 16, "cuda": 64}
_PRECISION = 10_000  # Ray counts GPUs in ten-thousandths


@dataclass(frozen=True)
class Placement:
    """Where a pool's workers run: what its settings leave open, decided.

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


def place_pools(config: ServiceConfig, gpus: float | None) -> tuple[Placement, Placement]:
    """Decide for the prefill and the decode pool.

    A pool on `auto` takes GPUs if every rank of every worker that wants one gets its `num_gpus`. Where that is not set
    it is 1, or, where there are GPUs but fewer than ranks, an equal part, with the same part of the memory. Workers of
    several ranks share GPUs only where each has a rank on every GPU.

    Args:
        config: the service's.
        gpus: that the Ray cluster has; None: there is no Ray, all workers are in this process, and `auto` is the CPU.

    Raises:
        ConfigError: a pool on `cuda` does not get its GPUs.
    """
    pools: dict[str, PoolConfig] = {"prefill": config.prefill, "decode": config.decode}
    forced = {name: pool for name, pool in pools.items() if pool.device == "cuda"}
    willing = {name: pool for name, pool in pools.items() if pool.device != "cpu"}
    if gpus is None:
        on_gpu, part = forced, 1 / max(1, sum(_ranks(pool) for pool in forced.values()))
    else:
        on_gpu, part = _fitting(willing, forced, gpus)
    block_size = _BLOCK_SIZE["cuda" if len(on_gpu) == len(pools) else "cpu"]
    prefill, decode = (
        _placement(pool, "cuda" if name in on_gpu else "cpu", part, block_size) for name, pool in pools.items()
    )
    return prefill, decode


def _fitting(
    willing: dict[str, PoolConfig], forced: dict[str, PoolConfig], gpus: float
) -> tuple[dict[str, PoolConfig], float]:
    """The pools that go to the GPUs, and the part of one that a worker gets where its settings do not say."""
    for pools in (willing, forced):
        part = _part(pools.values(), gpus)
        if part is not None:
            return pools, part
        if gpus >= 1 and any(pool.tensor_parallel_size > 1 for pool in pools.values()):
            raise ConfigError(_too_few_for_ranks(pools, gpus))
    needed = sum(_ranks(pool) * (1.0 if pool.num_gpus is None else pool.num_gpus) for pool in forced.values())
    raise ConfigError(
        f"the workers need {needed:g} GPUs, the Ray cluster has {gpus:g}; set device to cpu, or num_gpus below 1 so "
        "that workers share a GPU"
    )


def _ranks(pool: PoolConfig) -> int:
    return pool.replicas * pool.tensor_parallel_size


def _too_few_for_ranks(pools: dict[str, PoolConfig], gpus: float) -> str:
    needed = sum(_ranks(pool) * (1.0 if pool.num_gpus is None else pool.num_gpus) for pool in pools.values())
    sizes = " and ".join(f"{pool.replicas} × {pool.tensor_parallel_size} for {name}" for name, pool in pools.items())
    return (
        f"the workers' ranks need {needed:g} GPUs ({sizes}), the Ray cluster has {gpus:g}; lower replicas or "
        "tensor_parallel_size, set device to cpu, or let workers share all GPUs: tensor_parallel_size equal to their "
        "number, and num_gpus below 1"
    )


def _part(pools: Collection[PoolConfig], gpus: float) -> float | None:
    """The part of a GPU for each rank whose `num_gpus` is open; None when the GPUs do not suffice."""
    left = gpus - sum(_ranks(pool) * pool.num_gpus for pool in pools if pool.num_gpus is not None)
    ranks = sum(_ranks(pool) for pool in pools if pool.num_gpus is None)
    if left < 0:
        return None
    part = 1.0
    if ranks > left:
        if left < 1:
            return None
        part = math.floor(_PRECISION / math.ceil(ranks / math.floor(left))) / _PRECISION
    shares = [part if pool.num_gpus is None else pool.num_gpus for pool in pools]
    sharing = any(share < 1 and pool.tensor_parallel_size > 1 for share, pool in zip(shares, pools, strict=True))
    if sharing and any(pool.tensor_parallel_size != math.floor(gpus) for pool in pools):
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
