"""Starts the whole service on a Ray cluster, and stops it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import torch

from attention.kv_cache import KVCacheSpec
from attention.measurements import FILE_NAME
from cluster.api import ModelInfo, WorkerStatus
from cluster.config import PoolConfig, ServiceConfig, cache_dir
from cluster.engine import ServingEngine
from cluster.generation import Generation
from cluster.inprocess import InProcessWorker
from cluster.placement import Placement, place_pools
from cluster.ray_worker import RayWorker
from cluster.recall import SHIPPED_MODEL
from cluster.text.tokenizer import Tokenizer
from cluster.worker_handle import LoadProgress, WorkerHandle
from kv_transfer.local import LocalFabric
from workers.config import WorkerConfig
from workers.errors import ConfigError
from workers.models.checkpoint import resolve_checkpoint
from workers.models.config import ModelConfig
from workers.models.loader import KV_CACHE_DTYPES, model_bytes, resolve_dtype

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 20.0
_REACH_TIMEOUT_S = 5.0
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
            gpus = ray.cluster_resources().get("GPU", 0.0)
        prefill, decode = place_pools(config, gpus)
        dtype = resolve_dtype(config.model.dtype, model)
        engine = ServingEngine(
            _places(config, "prefill", config.prefill, prefill, folder, spawn),
            _places(config, "decode", config.decode, decode, folder, spawn),
            max_queue=config.server.max_queue,
            progress=_loading_lines(report),
        )
        stack.push_async_callback(_stop_within, engine, _SHUTDOWN_TIMEOUT_S)
        report(
            f"loading {folder.name} into {config.prefill.replicas} prefill workers on {prefill.device} and "
            f"{config.decode.replicas} decode workers on {decode.device}, {_size(model_bytes(model, dtype))} each"
        )
        await engine.start()
        for worker in engine.workers():
            pool = config.prefill if worker.role == "prefill" else config.decode
            report(_worker_line(worker, model, KV_CACHE_DTYPES[pool.kv_cache_dtype] or dtype))
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
        for number in range(pool.replicas)
    ]


def _worker_config(
    config: ServiceConfig, role: str, pool: PoolConfig, placement: Placement, folder: Path, number: int
) -> WorkerConfig:
    workers = config.prefill.replicas + config.decode.replicas
    return WorkerConfig(
        name=f"{role}-{number}",
        role=role,
        model=str(folder),
        dtype=config.model.dtype,
        load_format=config.model.load_format,
        device=placement.device,
        threads=pool.threads or max(1, (os.cpu_count() or 1) // workers),
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
        handoff_timeout_s=config.handoff.timeout_s,
    )


def _spawn_in_process(
    worker: WorkerConfig, pool: PoolConfig, placement: Placement, *, fabric: LocalFabric
) -> InProcessWorker:
    return InProcessWorker(worker, fabric)


def _spawn_actor(worker: WorkerConfig, pool: PoolConfig, placement: Placement, *, env: dict[str, str]) -> RayWorker:
    threads = {"OMP_NUM_THREADS": str(worker.threads)} if worker.threads else {}
    return RayWorker(worker, num_cpus=pool.num_cpus, num_gpus=placement.num_gpus, env={**env, **threads})


def _worker_line(worker: WorkerStatus, model: ModelConfig, kv_dtype: torch.dtype) -> str:
    """What a worker that is ready has: its device, its backend and its KV cache."""
    blocks, size = worker.load.total_blocks, worker.block_size
    spec = KVCacheSpec(model.num_layers, model.num_kv_heads, model.head_size, size, kv_dtype)
    return (
        f"{worker.role} worker {worker.engine_id} on {worker.device}: {worker.attention_backend}, "
        f"{blocks} KV blocks of {size} tokens ({blocks * size} tokens, {_size(blocks * spec.bytes_per_block)})"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _start_ray(config: ServiceConfig, report: Callable[[str], None]) -> bool:
    """Join the cluster that the configuration names, or start one here. Returns whether one was started.

    Raises:
        ConfigError: the cluster cannot be reached, or cannot hold the workers.
    """
    needed = sum(pool.replicas * pool.num_cpus for pool in (config.prefill, config.decode))
    local = config.ray.address is None
    report("starting Ray on this machine" if local else f"joining the Ray cluster at {config.ray.address}")
    _check_reachable(config.ray.address)
    try:
        ray.init(
            address="local" if local else config.ray.address,
            namespace=config.ray.namespace,
            # A small machine may share its cores between workers; a cluster's own figures are its operator's business.
            num_cpus=max(os.cpu_count() or 1, int(-(-needed // 1))) if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot reach Ray at {config.ray.address}: {str(error).splitlines()[0]}") from error
    available = ray.cluster_resources().get("CPU", 0.0)
    if available < needed:
        ray.shutdown()
        raise ConfigError(f"the workers need {needed:g} CPUs, the Ray cluster has {available:g}")
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


def _loading_lines(report: Callable[[str], None]) -> LoadProgress:
    """Progress of loading as lines, one for every tenth of a worker's weights."""
    shown: dict[str, int] = {}
    lock = threading.Lock()

    def progress(name: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        with lock:
            if tenth <= shown.get(name, 0):
                return
            shown[name] = tenth
        report(f"{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB of weights")

    return progress


async def _stop_within(engine: ServingEngine, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(engine.stop(), timeout_s)
    except TimeoutError:
        logger.warning("the workers did not stop within %g s", timeout_s)
