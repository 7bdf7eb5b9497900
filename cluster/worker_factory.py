"""How the workers of each group are made: a configuration for every place, and what starts a worker from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from attention.selection.measurements import FILE_NAME
from cluster.config.groups import WorkerGroup, groups_of
from cluster.config.load import cache_dir
from cluster.config.schema import PoolConfig, ServiceConfig
from cluster.device_placement import Placement
from cluster.inprocess_worker import InProcessWorker
from cluster.pools.gpu_budget import GpuBudget, Share
from cluster.pools.groups import PoolLimits
from cluster.ray.lease_keeper import LeaseKeeper
from cluster.ray.placement_group import RankResources
from cluster.ray.worker import RayWorker
from cluster.worker_handle import WorkerHandle
from kv_transfer.transports.local import LocalFabric
from workers.config import WorkerConfig

_HOST_MEMORY_SHARE = 0.1

Start = Callable[[WorkerConfig, PoolConfig, Placement], WorkerHandle]
"""Starts a worker."""


def places_of(
    config: ServiceConfig, role: str, placements: Mapping[str, Placement], folder: Path, start: Start
) -> dict[str, list[Callable[[], WorkerHandle]]]:
    """For every place in a pool, by group, how to make a worker for it."""

    def place(group: WorkerGroup, number: int) -> Callable[[], WorkerHandle]:
        placement = placements[group.key]
        return partial(start, _worker_config(config, group, placement, folder, number), group.settings, placement)

    return {
        group.name: [place(group, number) for number in range(group.settings.max_replicas)]
        for group in groups_of(config)
        if group.role == role
    }


def limits_of(pool: PoolConfig) -> PoolLimits:
    """How large a group may be."""
    return PoolLimits(pool.replicas, pool.fewest_replicas, pool.drain_timeout_s)


def gpu_budget(groups: Sequence[WorkerGroup], placements: Mapping[str, Placement], gpus: float) -> GpuBudget | None:
    """The GPUs that groups share which have no nodes of their own to wait for; None: they are no matter."""
    shares = {
        group.key: Share(group.settings.tensor_parallel_size, placements[group.key].num_gpus)
        for group in groups
        if placements[group.key].num_gpus and not group.settings.waits_for_nodes
    }
    return GpuBudget(gpus, shares) if shares else None


def start_in_process(
    worker: WorkerConfig, pool: PoolConfig, placement: Placement, *, fabric: LocalFabric
) -> InProcessWorker:
    """Start a worker in this process."""
    return InProcessWorker(worker, fabric)


def start_actor(
    worker: WorkerConfig, pool: PoolConfig, placement: Placement, *, env: dict[str, str], leases: LeaseKeeper
) -> RayWorker:
    """Start a worker as Ray actors, each with `env` in its environment; `leases` are renewed while it is heard of."""
    threads = {"OMP_NUM_THREADS": str(worker.threads)} if worker.threads else {}
    resources = RankResources(
        pool.num_cpus,
        placement.num_gpus,
        placement.gpu_by_rank,
        {**env, **threads},
        custom=pool.resources or {},
        labels=pool.labels or {},
    )
    return RayWorker(worker, resources, leases)


def host_memory_share(config: ServiceConfig, ranks: int) -> float:
    """The share of a machine's memory for each rank's KV cache on a CPU, where no size is given.

    A tenth, which leaves room for models and for other programs; less where so many ranks are all on this machine that
    their caches would take more than half of it.
    """
    return _HOST_MEMORY_SHARE if config.ray.address else min(_HOST_MEMORY_SHARE, 0.5 / max(1, ranks))


def _worker_config(
    config: ServiceConfig, group: WorkerGroup, placement: Placement, folder: Path, number: int
) -> WorkerConfig:
    pool, ranks = group.settings, sum(group.ranks for group in groups_of(config))
    return WorkerConfig(
        name=f"{group.label}-{number}",
        role=group.role,
        model=str(folder),
        dtype=config.model.dtype,
        load_format=config.model.load_format,
        device=placement.device,
        tensor_parallel_size=pool.tensor_parallel_size,
        threads=pool.threads or max(1, (os.cpu_count() or 1) // ranks),
        attention_backend=pool.attention_backend,
        block_size=placement.block_size,
        num_blocks=pool.num_blocks,
        kv_cache_bytes=int(pool.kv_cache_gb * 1e9) if pool.kv_cache_gb is not None else None,
        kv_cache_dtype=pool.kv_cache_dtype,
        expert_weights=pool.expert_weights,
        gpu_memory_utilization=placement.gpu_memory_utilization,
        host_memory_share=host_memory_share(config, ranks),
        enforce_eager=pool.enforce_eager,
        attention_measurements=str(cache_dir() / FILE_NAME),
        max_model_len=config.model.max_model_len,
        max_num_seqs=pool.max_num_seqs,
        max_num_batched_tokens=pool.max_num_batched_tokens,
        local_prefill=group.role == "decode" and config.router.disaggregation != "always",
        layers_per_write=config.handoff.layers_per_write,
        enable_prefix_caching=pool.enable_prefix_caching,
        handoff_timeout_s=config.handoff.timeout_s,
        log_folder=config.logging.folder or str(cache_dir() / "logs"),
        log_level=config.logging.level,
        log_format=config.logging.format,
    )
