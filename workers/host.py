"""One worker, whole: model, cache, connector and loop, built from its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from attention.spec import Phase
from kv_transfer.connector import KVConnector
from kv_transfer.transport import EngineInfo
from workers.capability import Capability, measure_decode, measure_prefill
from workers.config import WorkerConfig
from workers.decode import DecodeWorker
from workers.errors import ConfigError
from workers.kv_memory import allocate_kv_cache, kv_layout
from workers.largest_batches import largest_batches_of
from workers.loop import WorkerLoop
from workers.messages import DecodeRequest, PrefillRequest, StepOutput
from workers.model_runner import ModelRunner
from workers.models.decoder import Decoder
from workers.models.loader import load_model
from workers.prefill import PrefillWorker


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself once it is ready.

    Attributes:
        name: such as "prefill-0".
        role: "prefill" or "decode".
        engine: how its peers reach it.
        device: such as "cpu" or the card's name.
        attention_backend: the chosen one.
        max_model_len: context window, tokens.
        max_num_seqs: sequences that it takes at once.
        num_blocks: of its KV cache.
        capability: measured on its device.
        pid: of its process.
    """

    name: str
    role: str
    engine: EngineInfo
    device: str
    attention_backend: str
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    capability: Capability
    pid: int


class WorkerHost:
    """Builds a worker and runs it on a thread of its own.

    Args:
        config: the worker's.
        connector: new; the host registers the cache with it and closes it.
        emit: takes each step's output, on the worker's thread.
        on_crash: told of an unexpected error in the worker.
        progress: told of (bytes read, bytes of all weights) while loading.
        capture_progress: told of (CUDA graphs captured, all of them) while a decode worker on a GPU captures its steps.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the configuration does not fit the model or the machine.
    """

    def __init__(
        self,
        config: WorkerConfig,
        connector: KVConnector,
        emit: Callable[[StepOutput], None],
        on_crash: Callable[[BaseException], None],
        progress: Callable[[int, int], None] | None = None,
        capture_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model = load_model(
            config.model,
            config.dtype,
            config.device,
            config.block_size,
            config.attention_backend,
            progress,
            config.load_format,
            phase=Phase(config.role),
            kv_cache_dtype=config.kv_cache_dtype,
            measurements=Path(config.attention_measurements) if config.attention_measurements else None,
        )
        spec, max_model_len = model.kv_cache_spec, resolve_max_model_len(config, model)
        profile = largest_batches_of(model, config, max_model_len)
        runner = ModelRunner(model, allocate_kv_cache(config, spec, max_model_len, profile))
        worker = _worker(config, max_model_len, runner, connector, capture_progress)
        capability = _measure(worker, runner, config, max_model_len)
        self._connector = connector
        engine = connector.register_kv_caches(config.name, runner.kv_cache, kv_layout(spec))
        self.info = WorkerInfo(
            config.name,
            config.role,
            engine,
            torch.cuda.get_device_name() if config.device == "cuda" else config.device,
            model.backend.name,
            max_model_len,
            config.max_num_seqs,
            runner.kv_cache.shape[1],
            capability,
            os.getpid(),
        )
        self._loop = WorkerLoop(engine.engine_id, worker, emit, on_crash)
        connector.set_listener(self._loop.wake)
        self._loop.start()

    def submit(self, request: PrefillRequest | DecodeRequest) -> None:
        """Give the worker a request of its role.

        Raises:
            TypeError: it is one of the other role.
        """
        if isinstance(request, PrefillRequest) != (self.info.role == "prefill"):
            raise TypeError(f"{type(request).__name__} sent to {self.info.name}")

        def deliver(worker: PrefillWorker | DecodeWorker) -> None:
            if isinstance(worker, PrefillWorker) and isinstance(request, PrefillRequest):
                worker.add(request)
            elif isinstance(worker, DecodeWorker) and isinstance(request, DecodeRequest):
                worker.reserve(request)

        self._loop.post(deliver)

    def abort(self, request_id: str) -> None:
        """Stop a request."""
        self._loop.post(lambda worker: worker.abort(request_id))

    def connect(self, peer: EngineInfo, timeout_s: float) -> None:
        """Meet a peer; see `KVConnector.connect`."""
        self._connector.connect(peer, timeout_s)

    def probe(self, engine_id: str, timeout_s: float) -> float:
        """Prove the path to a peer; see `KVConnector.probe`."""
        return self._connector.probe(engine_id, timeout_s)

    def disconnect(self, engine_id: str) -> None:
        """A peer's process is gone."""
        self._loop.post(lambda worker: worker.disconnect(engine_id))

    def close(self) -> None:
        """Stop the loop, then the connector."""
        self._loop.stop()
        self._connector.close()


def resolve_max_model_len(config: WorkerConfig, model: Decoder) -> int:
    """The context window.

    Raises:
        ConfigError: longer than the model's positions.
    """
    limit = model.config.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(f"model.max_model_len is {config.max_model_len}, the model has {limit} positions")
    return config.max_model_len


def _worker(
    config: WorkerConfig,
    max_model_len: int,
    runner: ModelRunner,
    connector: KVConnector,
    capture_progress: Callable[[int, int], None] | None,
) -> PrefillWorker | DecodeWorker:
    if config.role == "decode":
        return DecodeWorker(
            runner,
            connector,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            enforce_eager=config.enforce_eager,
            progress=capture_progress,
        )
    return PrefillWorker(
        runner,
        connector,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        layers_per_group=config.layers_per_group,
        handoff_timeout_s=config.handoff_timeout_s,
    )


def _measure(
    worker: PrefillWorker | DecodeWorker, runner: ModelRunner, config: WorkerConfig, max_model_len: int
) -> Capability:
    """What the new worker can do; it has no peers yet, so nobody minds what is in its cache."""
    if isinstance(worker, PrefillWorker):
        return measure_prefill(runner, max_tokens=min(max_model_len, config.max_num_batched_tokens))
    return measure_decode(
        worker.decoder,
        num_blocks=runner.kv_cache.shape[1],
        block_size=runner.block_size,
        max_num_seqs=config.max_num_seqs,
    )
