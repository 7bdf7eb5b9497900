"""A worker put together from its configuration: model, cache, worker, and what it measured of itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from attention.kv_cache import as_stored
from attention.spec import Phase
from kv_transfer.connector import KVConnector
from kv_transfer.transports.base import EngineInfo
from workers.config import WorkerConfig
from workers.decode_worker import DecodeWorker
from workers.errors import CacheTooSmallError
from workers.grammars.compiler import GrammarCompiler
from workers.handoff.share_exchange import ShareExchange
from workers.kv_cache.sizing import allocate_kv_caches, kv_layout
from workers.models.cache_groups import copies_of_groups
from workers.models.causal_lm import CausalLM
from workers.models.loader import load_model
from workers.parallel.group import SINGLE, TensorParallelGroup
from workers.prefill_worker import PrefillWorker
from workers.runner.measured_steps import measure_decode, measure_prefill
from workers.runner.model_runner import ModelRunner
from workers.runner.profile_run import largest_batches_of
from workers.runner.step_times import StepTimes
from workers.sampling.warm_up import warm_up_sampling
from workers.scheduling.local_prefill import warm_up_chunks

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@dataclass(frozen=True)
class WorkerMemory:
    """What a worker holds on its device; of several ranks, what each one holds.

    Attributes:
        weights_bytes: of the model.
        kv_cache_bytes: of the KV cache.
        num_graphs: CUDA graphs, by the sizes that they are for.
        graphs_bytes: what the card has less of since they are captured, with the buffers of the worker's steps. Another
            worker that starts on the same card at that moment is counted, too.
    """

    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    num_graphs: int = 0
    graphs_bytes: int = 0


@dataclass(frozen=True)
class BuiltWorker:
    """A worker, or a rank's copy of one, that is ready to step.

    Attributes:
        worker: nothing has been asked of it yet.
        engine: how the rank's peers reach it.
        device_name: such as "cpu" or the card's name.
        attention_backend: the chosen one.
        max_model_len: context window, tokens.
        num_blocks: of its KV cache's primary group, for sequences to have.
        step_times: measured on its device.
        memory: what it takes there.
        blocks_per_sequence: of these, the most that a sequence holds at once; None: those of all its tokens.
        grammars: compiles what its requests ask for.
    """

    worker: PrefillWorker | DecodeWorker
    engine: EngineInfo
    device_name: str
    attention_backend: str
    max_model_len: int
    num_blocks: int
    step_times: StepTimes
    memory: WorkerMemory
    blocks_per_sequence: int | None
    grammars: GrammarCompiler


def build_worker(
    config: WorkerConfig,
    connector: KVConnector,
    *,
    group: TensorParallelGroup = SINGLE,
    clock: Callable[[], float] = time.monotonic,
    load_progress: Progress | None = None,
    capture_progress: Progress | None = None,
) -> BuiltWorker:
    """Load the model, allocate the cache, make the worker, measure it, and register its cache.

    The ranks of a worker do all of this together, and come out with equal caches and capabilities.

    Args:
        config: the worker's.
        connector: new.
        group: the ranks of the worker.
        clock: the worker's.
        load_progress: told of (bytes read, bytes of all weights).
        capture_progress: told of (CUDA graphs captured, all of them).

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the configuration does not fit the model or the machine.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(
        config.model,
        config.dtype,
        config.device,
        config.block_size,
        config.attention_backend,
        load_progress,
        config.load_format,
        phase=Phase(config.role),
        local_prefill=config.local_prefill,
        kv_cache_dtype=config.kv_cache_dtype,
        measurements=Path(config.attention_measurements) if config.attention_measurements else None,
        group=group,
        max_model_len=config.max_model_len,
        expert_weights=config.expert_weights,
    )
    kv_caches, max_model_len = _caches_and_context(config, model, group)
    runner = ModelRunner(model, kv_caches)
    copies = copies_of_groups(model.kv_cache_groups, model.config.attention, group.size)
    graphs = _Graphs(runner.device, capture_progress)
    vocabulary = (model.config.vocab_size, model.config.eos_token_ids)
    grammars = GrammarCompiler.of_checkpoint(Path(config.model), *vocabulary)
    exchange = ShareExchange(runner.kv_caches, copies, group)
    worker = _make_worker(config, max_model_len, runner, connector, clock, graphs.captured, grammars, exchange)
    memory = graphs.memory(
        model.weights_bytes,
        sum(kv_cache.nbytes for kv_cache in runner.kv_caches),
    )
    step_times = worker.step_times = measure_step_times(worker, runner, config, max_model_len, group)
    if isinstance(worker, PrefillWorker):
        worker.layers_per_write.step_times = step_times
    return BuiltWorker(
        worker,
        connector.register_kv_caches(
            config.name,
            [as_stored(kv_cache) for kv_cache in runner.kv_caches],
            kv_layout(model.kv_cache_groups, group.size, model.identity, group.rank, copies),
        ),
        torch.cuda.get_device_name() if config.device == "cuda" else config.device,
        model.backend_names,
        max_model_len,
        worker.cache.num_blocks,
        step_times,
        memory,
        worker.cache.blocks_per_sequence(max_model_len, computed=isinstance(worker, PrefillWorker)),
        grammars,
    )


def _caches_and_context(
    config: WorkerConfig, model: CausalLM, group: TensorParallelGroup
) -> tuple[list[torch.Tensor], int]:
    """The KV caches, and the context window: what was asked for, or as much of the model's own as they hold.

    Raises:
        ConfigError: see `allocate_kv_caches`.
    """
    max_model_len = model.max_model_len

    def allocate(length: int) -> list[torch.Tensor]:
        profile = largest_batches_of(model, config, length)
        return allocate_kv_caches(config, model.kv_cache_groups, length, profile, group.agree_min)

    try:
        return allocate(max_model_len), max_model_len
    except CacheTooSmallError as error:  # on all ranks alike: they agree on the number of blocks
        if config.max_model_len is not None or not error.num_tokens:
            raise
        logger.warning("%s: context window of %d instead of %d tokens", config.name, error.num_tokens, max_model_len)
        return allocate(error.num_tokens), error.num_tokens


def _make_worker(
    config: WorkerConfig,
    max_model_len: int,
    runner: ModelRunner,
    connector: KVConnector,
    clock: Callable[[], float],
    capture_progress: Progress,
    grammars: GrammarCompiler,
    exchange: ShareExchange,
) -> PrefillWorker | DecodeWorker:
    if config.role == "prefill" or config.local_prefill:  # logits of prompts are float32
        warm_up_sampling(runner.model.config.vocab_size, torch.float32, runner.device)
    if config.role == "decode":
        return DecodeWorker(
            runner,
            connector,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens if config.local_prefill else None,
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=config.enable_prefix_caching,
            grammars=grammars,
            exchange=exchange,
            progress=capture_progress,
            clock=clock,
        )
    return PrefillWorker(
        runner,
        connector,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        layers_per_write=config.layers_per_write,
        handoff_timeout_s=config.handoff_timeout_s,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        grammars=grammars,
        progress=capture_progress,
        clock=clock,
    )


def measure_step_times(
    worker: PrefillWorker | DecodeWorker,
    runner: ModelRunner,
    config: WorkerConfig,
    max_model_len: int,
    group: TensorParallelGroup,
) -> StepTimes:
    """What the new worker can do; it has no peers yet, so nobody minds what is in its cache."""

    def slowest(seconds: float) -> float:
        return -group.agree_min(-round(seconds * 1e9)) / 1e9

    prefill = StepTimes()
    if config.role == "prefill" or config.local_prefill:
        max_tokens = min(max_model_len, config.max_num_batched_tokens)
        prefill = measure_prefill(runner, max_tokens=max_tokens, agree=slowest)
    if config.local_prefill:
        warm_up_chunks(runner, config.max_num_batched_tokens, max_model_len)
    if isinstance(worker, PrefillWorker):
        return prefill
    decode = measure_decode(
        worker.decoder,
        groups=runner.groups,
        num_blocks=runner.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        agree=slowest,
    )
    return replace(decode, prefill=prefill.prefill)


class _Graphs:
    """Counts the CUDA graphs of a worker that is being made, and the memory that the card has less of since.

    Args:
        device: of the worker.
        progress: told how far capturing is.
    """

    def __init__(self, device: torch.device, progress: Progress | None) -> None:
        self._device = device
        self._progress = progress
        self._count = 0
        self._free_before = self._free()

    def captured(self, done: int, total: int) -> None:
        """So many of so many."""
        self._count = done
        if self._progress is not None:
            self._progress(done, total)

    def memory(self, weights_bytes: int, kv_cache_bytes: int) -> WorkerMemory:
        """All that the worker holds, now that it is made."""
        taken = max(0, self._free_before - self._free()) if self._count else 0
        return WorkerMemory(weights_bytes, kv_cache_bytes, self._count, taken)

    def _free(self) -> int:
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]
