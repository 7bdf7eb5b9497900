"""Starts the whole service on a Ray cluster, and stops it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import ray
import torch
from ray._common.utils import get_default_system_temp_dir

from cluster.api import ModelInfo
from cluster.autoscaling.autoscaler import Autoscaler, policies_of
from cluster.clock import now
from cluster.config.groups import groups_of
from cluster.config.load import ray_niceness_is_given, ray_token_is_given
from cluster.config.schema import AutoscalerConfig, ServiceConfig
from cluster.device_placement import place_groups
from cluster.gateway.engine import ServingEngine
from cluster.gateway.readiness import Readiness
from cluster.generation.grammar_check import GrammarCheck
from cluster.generation.text_generation import Generation
from cluster.launch_report import context_line, group_size, in_words, progress_lines, weights_size, worker_line
from cluster.live.observed import Observed
from cluster.observation import observe, request_observers
from cluster.pools.gpu_budget import GpuBudget
from cluster.pools.patience import Patience
from cluster.ray.control_service import missing_of_ray, until_lost
from cluster.ray.job import OwnModulesOnly
from cluster.ray.lease_keeper import LeaseKeeper
from cluster.ray.local_folders import check_temporary_folder, make_auth_token
from cluster.ray.node_demands import awaited_nodes, check_cpus, gpus_in_sight
from cluster.served_model import read_served_model
from cluster.worker_factory import Start, gpu_budget, limits_of, places_of, start_actor, start_in_process
from kv_transfer.transports.local import LocalFabric
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 20.0
_REACH_TIMEOUT_S = 5.0
_COUNT_INTERVAL_S = 10.0
_SYSTEM_CONFIG = {"worker_niceness": 0}
"""Ray runs its workers at 15, so that any other program of the machine goes before tokens."""


@dataclass(frozen=True)
class Service:
    """A running service, without a front door.

    Attributes:
        engine: takes token ids.
        generation: takes text.
        model_info: what is served.
        readiness: whether it can answer, once it is run.
        broken: done when it cannot go on, with the reason.
        observed: its metrics and its last minutes; None: metrics.enabled is false.
    """

    engine: ServingEngine
    generation: Generation
    model_info: ModelInfo
    readiness: Readiness
    broken: asyncio.Future[str]
    observed: Observed | None = None


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
    served, groups = await read_served_model(config), groups_of(config)  # what is wrong is told before Ray starts
    async with contextlib.AsyncExitStack() as stack:
        start, present = await _prepare(config, report, stack)
        placements = place_groups(config, None if present is None else gpus_in_sight(config, present))
        if present is None and any(p.device == "cuda" for p in placements.values()) and not torch.cuda.is_available():
            raise ConfigError("workers are to run on GPUs, and this machine has none that PyTorch can use")
        stock = None if present is None else gpu_budget(groups, placements, present.get("GPU", 0.0))
        engine = ServingEngine(
            places_of(config, "prefill", placements, served.folder, start),
            places_of(config, "decode", placements, served.folder, start),
            max_queue=config.server.max_queue,
            max_queue_wait_s=config.server.max_queue_wait_s,
            limits={group.key: limits_of(group.settings) for group in groups},
            patience=Patience(**asdict(config.liveness)),
            progress=progress_lines(report),
            gpus=stock,
            tokenizer=served.tokenizer_digest,
            disaggregation=config.router.disaggregation,
        )
        for observer in request_observers(config, served.tokenizer, stack):
            engine.observe(observer)
        stack.push_async_callback(_stop_within, engine, _SHUTDOWN_TIMEOUT_S)
        sizes = [group_size(group, placements[group.key].device) for group in groups if group.settings.replicas]
        weights = weights_size(served.num_bytes, served.dtype, served.stored)
        report(f"loading {served.folder.name} into {in_words(sizes)}, {weights}")
        if not any(group.settings.replicas for group in groups if group.role == "prefill"):
            report("there are no prefill workers: every prompt is computed on its decode worker")
        await engine.start()
        if stock is not None:
            stack.callback(asyncio.create_task(_count_gpus(stock)).cancel)
        _autoscale(config.autoscaler, engine, report, stack)
        for worker in engine.infos():
            report(worker_line(worker))
        if line := context_line(
            config.model.max_model_len, engine.max_model_len, served.config.max_position_embeddings
        ):
            report(line)
        info = served.info(engine.max_model_len)
        readiness = Readiness(engine, config.server.health_interval_s, config.server.health_timeout_s)
        grammars = GrammarCheck(served.folder, info.vocab_size, info.eos_token_ids)
        stack.push_async_callback(grammars.aclose)
        parts = (served.sampling_defaults, grammars, served.formats, config.server.max_n)
        generation = Generation(engine, served.tokenizer, info, *parts)
        looked_at = await observe(config.metrics, stack, engine, generation, info, readiness)
        broken = _watch_ray() if present is not None else asyncio.get_running_loop().create_future()
        stack.callback(broken.cancel)
        yield Service(engine, generation, info, readiness, broken, looked_at)


async def _prepare(
    config: ServiceConfig, report: Callable[[str], None], stack: contextlib.AsyncExitStack
) -> tuple[Start, Mapping[str, float] | None]:
    """What starts workers, and the resources of the Ray cluster that they start on; None: it is this process."""
    if config.handoff.connector == "local":
        return partial(start_in_process, fabric=LocalFabric()), None
    local = await asyncio.to_thread(_start_ray, config, report)
    stack.push_async_callback(asyncio.to_thread, ray.shutdown)
    present: Mapping[str, float] = ray.cluster_resources()
    for line in awaited_nodes(config, present):
        report(line)
    return partial(start_actor, env=_worker_environment(local), leases=LeaseKeeper()), present


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


def _watch_ray() -> asyncio.Future[str]:
    """Done when what the service needs of Ray is gone."""
    return asyncio.ensure_future(until_lost(missing_of_ray))


async def _count_gpus(stock: GpuBudget) -> None:
    """Look now and then how many GPUs the cluster has, for ever: nodes come and go."""
    while True:
        await asyncio.sleep(_COUNT_INTERVAL_S)
        with contextlib.suppress(Exception):  # Ray may be out of reach for a while
            stock.total = (await asyncio.to_thread(ray.cluster_resources)).get("GPU", 0.0)


def _start_ray(config: ServiceConfig, report: Callable[[str], None]) -> bool:
    """Join the cluster that the configuration names, or start one here. Returns whether one was started.

    Raises:
        ConfigError: the cluster cannot be reached, or cannot hold the workers.
    """
    pools = [group.settings for group in groups_of(config)]
    most = sum(pool.max_replicas * pool.tensor_parallel_size * pool.num_cpus for pool in pools)
    local = config.ray.address is None
    report("starting Ray on this machine" if local else f"joining the Ray cluster at {config.ray.address}")
    _check_reachable(config.ray.address)
    if local:
        check_temporary_folder(Path(get_default_system_temp_dir()))
        if not ray_token_is_given():
            make_auth_token(Path.home())
    # Inherited by Ray's processes: a terminal that closes ends this process in good order, not the workers before it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        ray.init(
            address="local" if local else config.ray.address,
            namespace=config.ray.namespace,
            job_config=OwnModulesOnly(),
            # A small machine may share its cores between all workers that pools may have; a cluster's own figures are
            # its operator's business.
            num_cpus=max(os.cpu_count() or 1, int(-(-most // 1))) if local else None,
            include_dashboard=False if local else None,
            _system_config=None if not local or ray_niceness_is_given() else dict(_SYSTEM_CONFIG),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        what = "start Ray on this machine" if local else f"reach Ray at {config.ray.address}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot {what}: {reason}") from error
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
