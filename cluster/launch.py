"""Starts the whole service on a Ray cluster, and stops it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray

from attention.measurements import FILE_NAME
from cluster.api import ModelInfo
from cluster.autoscaler import Autoscaler, policies_of
from cluster.clock import now
from cluster.config import cache_dir
from cluster.config_sections import AutoscalerConfig, PoolConfig, ServiceConfig
from cluster.engine import ServingEngine
from cluster.generation import Generation
from cluster.inprocess import InProcessWorker
from cluster.node_demands import awaited_nodes, check_cpus, gpus_in_sight
from cluster.placement import Placement, place_pools
from cluster.pools.scaling import PoolLimits
from cluster.rank_placement import RankResources
from cluster.ray_worker import RayWorker
from cluster.recall import SHIPPED_MODEL
from cluster.start_lines import pool_size, progress_lines, readable_size, worker_line
from cluster.text.tokenizer import Tokenizer
from cluster.worker_handle import WorkerHandle
from kv_transfer.local import LocalFabric
from workers.config import WorkerConfig
from workers.errors import ConfigError
from workers.models.checkpoint import resolve_checkpoint
from workers.models.config import ModelConfig
from workers.models.loader import model_bytes, resolve_dtype

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 20.0
_REACH_TIMEOUT_S = 5.0
_SILENCE_S = 4.0  # workers say something every second
_Spawn = Callable[[WorkerConfig, PoolConfig, Placement], WorkerHandle]


@dataclass(frozen=True)
class Service:
    """A running service, without a front door.

    Attributes:
        engine: takes token ids.
        generation: takes text.
        model_info: what is served.
    """

    engine: ServingEngine
    generation: Generation
    model_info: ModelInfo


@contextlib.asynccontextmanager
async def launch(config: ServiceConfig, report: Callable[[str], None]) -> AsyncIterator[Service]:
    """Start Ray if it is not there, the workers, and the engine; stop what was started when the block ends.

    Args:
        config: the service's.
        report: takes one line of progress at a time.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the configuration does not fit the model or the machine.
    """
    path = config.model.path or str(SHIPPED_MODEL)
    folder = await asyncio.to_thread(resolve_checkpoint, path)
    model = ModelConfig.from_file(folder)
    for pool in (config.prefill, config.decode):
        model.sharded(pool.tensor_parallel_size)
    tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
    async with contextlib.AsyncExitStack() as stack:
        if config.handoff.connector == "local":
            spawn: _Spawn = partial(_spawn_in_process, fabric=LocalFabric())
            gpus = None
        else:
            local = await asyncio.to_thread(_start_ray, config, report)
            stack.push_async_callback(asyncio.to_thread, ray.shutdown)
            env = _worker_environment(local)
            spawn = partial(_spawn_actor, env=env)
            present = ray.cluster_resources()
            gpus = gpus_in_sight(config, present)
            for line in awaited_nodes(config, present):
                report(line)
        prefill, decode = place_pools(config, gpus)
        dtype = resolve_dtype(config.model.dtype, model)
        engine = ServingEngine(
            _places(config, "prefill", config.prefill, prefill, folder, spawn),
            _places(config, "decode", config.decode, decode, folder, spawn),
            max_queue=config.server.max_queue,
            max_queue_wait_s=config.server.max_queue_wait_s,
            limits={"prefill": _limits(config.prefill), "decode": _limits(config.decode)},
            silence_s=_SILENCE_S,
            progress=progress_lines(report),
        )
        stack.push_async_callback(_stop_within, engine, _SHUTDOWN_TIMEOUT_S)
        report(
            f"loading {folder.name} into {pool_size('prefill', config.prefill)} on {prefill.device} and "
            f"{pool_size('decode', config.decode)} on {decode.device}, {readable_size(model_bytes(model, dtype))} each"
        )
        await engine.start()
        _autoscale(config.autoscaler, engine, report, stack)
        for worker in engine.infos():
            report(worker_line(worker))
        info = ModelInfo(
            name=config.model.served_name or Path(path).name,
            architecture=model.family,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=engine.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=tokenizer.has_chat_template,
        )
        yield Service(engine, Generation(engine, tokenizer, info), info)


def _autoscale(
    config: AutoscalerConfig, engine: ServingEngine, report: Callable[[str], None], stack: contextlib.AsyncExitStack
) -> None:
    """Have the pools' sizes looked after until the stack ends, if that is wanted."""
    if config.mode == "off":
        return
    autoscaler = Autoscaler(
        engine,
        policies_of(config, now),
        interval_s=config.interval_s,
        dry_run=config.mode == "dry-run",
        report=report,
    )
    task = asyncio.create_task(autoscaler.run())
    stack.callback(task.cancel)


def _places(
    config: ServiceConfig,
    role: str,
    pool: PoolConfig,
    placement: Placement,
    folder: Path,
    spawn: _Spawn,
) -> list[Callable[[], WorkerHandle]]:
    """For every place in a pool, how to make a worker for it."""
    return [
        partial(spawn, _worker_config(config, role, pool, placement, folder, number), pool, placement)
        for number in range(pool.max_replicas)
    ]


def _limits(pool: PoolConfig) -> PoolLimits:
    return PoolLimits(pool.replicas, pool.min_replicas, pool.drain_timeout_s)


def _worker_config(
    config: ServiceConfig, role: str, pool: PoolConfig, placement: Placement, folder: Path, number: int
) -> WorkerConfig:
    ranks = sum(pool.replicas * pool.tensor_parallel_size for pool in (config.prefill, config.decode))
    return WorkerConfig(
        name=f"{role}-{number}",
        role=role,
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
        gpu_memory_utilization=placement.gpu_memory_utilization,
        enforce_eager=pool.enforce_eager,
        attention_measurements=str(cache_dir() / FILE_NAME),
        max_model_len=config.model.max_model_len,
        max_num_seqs=pool.max_num_seqs,
        max_num_batched_tokens=pool.max_num_batched_tokens,
        layers_per_group=config.handoff.layers_per_group,
        enable_prefix_caching=config.prefill.enable_prefix_caching,
        handoff_timeout_s=config.handoff.timeout_s,
    )


def _spawn_in_process(
    worker: WorkerConfig, pool: PoolConfig, placement: Placement, *, fabric: LocalFabric
) -> InProcessWorker:
    return InProcessWorker(worker, fabric)


def _spawn_actor(worker: WorkerConfig, pool: PoolConfig, placement: Placement, *, env: dict[str, str]) -> RayWorker:
    threads = {"OMP_NUM_THREADS": str(worker.threads)} if worker.threads else {}
    resources = RankResources(
        pool.num_cpus,
        placement.num_gpus,
        placement.gpu_by_rank,
        {**env, **threads},
        custom=pool.resources or {},
        labels=pool.labels or {},
    )
    return RayWorker(worker, resources)


def _start_ray(config: ServiceConfig, report: Callable[[str], None]) -> bool:
    """Join the cluster that the configuration names, or start one here. Returns whether one was started.

    Raises:
        ConfigError: the cluster cannot be reached, or cannot hold the workers.
    """
    most = sum(p.max_replicas * p.tensor_parallel_size * p.num_cpus for p in (config.prefill, config.decode))
    local = config.ray.address is None
    report("starting Ray on this machine" if local else f"joining the Ray cluster at {config.ray.address}")
    _check_reachable(config.ray.address)
    try:
        ray.init(
            address="local" if local else config.ray.address,
            namespace=config.ray.namespace,
            # A small machine may share its cores between all workers that pools may have; a cluster's own figures are
            # its operator's business.
            num_cpus=max(os.cpu_count() or 1, int(-(-most // 1))) if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot reach Ray at {config.ray.address}: {str(error).splitlines()[0]}") from error
    try:
        check_cpus(config, ray.cluster_resources())
    except ConfigError:
        ray.shutdown()
        raise
    return local


def _check_reachable(address: str | None) -> None:
    """Refuse an address where nobody listens: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", or a form that Ray resolves itself
    try:
        socket.create_connection((host, int(port)), _REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot reach Ray at {address}: {error}") from error


def _worker_environment(local: bool) -> dict[str, str]:
    """What every worker's process needs. On one machine NIXL listens on the loopback interface only."""
    env = {"NIXL_LOG_LEVEL": "WARN", "TOKENIZERS_PARALLELISM": "false"}
    return {**env, "UCX_NET_DEVICES": "lo"} if local else env


async def _stop_within(engine: ServingEngine, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(engine.stop(), timeout_s)
    except TimeoutError:
        logger.warning("the workers did not stop within %g s", timeout_s)
