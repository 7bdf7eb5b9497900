"""One worker, whole: model, cache, connector and loop, built from its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from attention.kv_cache import KVCacheSpec
from kv_transfer.connector import KVConnector
from kv_transfer.layout import KVLayout
from kv_transfer.transport import EngineInfo
from workers.block_manager import blocks_for
from workers.capability import Capability, measure
from workers.config import WorkerConfig
from workers.decode import DecodeWorker
from workers.errors import ConfigError
from workers.loop import WorkerLoop
from workers.messages import DecodeRequest, PrefillRequest, StepOutput
from workers.model_runner import ModelRunner
from workers.models.decoder import Decoder
from workers.models.loader import load_model
from workers.prefill import PrefillWorker

_CPU_MEMORY_SHARE = 0.1
_CUDA_MEMORY_SHARE = 0.85


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
        )
        config = replace(config, max_model_len=resolve_max_model_len(config, model))
        assert config.max_model_len is not None
        runner = ModelRunner(model, _allocate_cache(config, model))
        capability = measure(
            runner,
            config.role,
            max_tokens=min(config.max_model_len, config.max_num_batched_tokens),
            max_num_seqs=config.max_num_seqs,
        )
        self._connector = connector
        engine = connector.register_kv_caches(config.name, runner.kv_cache, _layout(model, config.block_size))
        self.info = WorkerInfo(
            config.name,
            config.role,
            engine,
            torch.cuda.get_device_name() if config.device == "cuda" else config.device,
            model.backend.name,
            config.max_model_len,
            config.max_num_seqs,
            runner.kv_cache.shape[1],
            capability,
            os.getpid(),
        )
        self._loop = WorkerLoop(engine.engine_id, _worker(config, runner, connector), emit, on_crash)
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


def _worker(config: WorkerConfig, runner: ModelRunner, connector: KVConnector) -> PrefillWorker | DecodeWorker:
    assert config.max_model_len is not None
    if config.role == "decode":
        return DecodeWorker(runner, connector, max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len)
    return PrefillWorker(
        runner,
        connector,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        layers_per_group=config.layers_per_group,
        handoff_timeout_s=config.handoff_timeout_s,
    )


def _layout(model: Decoder, block_size: int) -> KVLayout:
    config = model.config
    return KVLayout(
        kind="mha",
        num_layers=config.num_layers,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _allocate_cache(config: WorkerConfig, model: Decoder) -> torch.Tensor:
    spec = KVCacheSpec(
        model.config.num_layers, model.config.num_kv_heads, model.config.head_size, config.block_size, model.dtype
    )
    assert config.max_model_len is not None
    longest = blocks_for(config.max_model_len, config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_bytes is not None:
        num_blocks = spec.blocks_that_fit(config.kv_cache_bytes)
    else:  # no more than a full batch of the longest sequences can use
        num_blocks = min(spec.blocks_that_fit(_free_memory_share(config.device)), longest * config.max_num_seqs)
    if num_blocks < longest:
        raise ConfigError(
            f"{config.role} worker: a KV cache of {num_blocks} blocks of {config.block_size} tokens cannot hold one "
            f"sequence of max_model_len {config.max_model_len} ({longest} blocks); enlarge {config.role}.num_blocks or "
            f"{config.role}.kv_cache_gb, or lower model.max_model_len"
        )
    return spec.allocate(num_blocks, config.device)


def _free_memory_share(device: str) -> int:
    """Bytes that a KV cache may take when nobody has said."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * _CUDA_MEMORY_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_MEMORY_SHARE)
