"""How large a worker's KV cache is, and how it is described to peers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention.kv_cache import KVCacheSpec
from kv_transfer.identity import UNKNOWN, KVIdentity
from kv_transfer.layout import GroupLayout, KVLayout
from workers.config import WorkerConfig
from workers.errors import CacheTooSmallError, ConfigError
from workers.kv_cache.cache_split import CacheSplit, most_blocks
from workers.kv_cache.gpu_memory import GpuMemory, measure_gpu_memory
from workers.kv_cache.host_memory import cache_share, host_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVCachePlan:
    """The size of a worker's KV cache, and what it is beside.

    Attributes:
        num_blocks: of the primary group, in each layer, for sequences to have.
        num_tokens: that they hold.
        kv_bytes: all groups and layers together.
        gpu: what was measured; None on a CPU.
        counts: blocks of each group's tensor. A sliding group has one that no sequence gets, see `KVCacheManager`.
    """

    num_blocks: int
    num_tokens: int
    kv_bytes: int
    gpu: GpuMemory | None = None
    counts: tuple[int, ...] = ()

    def __str__(self) -> str:
        cache = f"KV cache {_gb(self.kv_bytes)}: {self.num_blocks} blocks, {self.num_tokens} tokens"
        if len(self.counts) > 1:
            cache += f" (blocks of all cache groups: {', '.join(map(str, self.counts))})"
        if self.gpu is None:
            return cache
        gpu = self.gpu
        return f"model {_gb(gpu.allocated)}, activations {_gb(gpu.activations)}, CUDA {_gb(gpu.context)}, {cache}"


def kv_layout(
    groups: Sequence[KVCacheSpec],
    tp_size: int = 1,
    identity: KVIdentity = UNKNOWN,
    tp_rank: int = 0,
    copies: Sequence[int] = (),
) -> KVLayout:
    """The cache of a rank as two workers compare it when they meet, and whose it is.

    Args:
        groups: what the rank keeps.
        tp_size: ranks of the worker.
        identity: of model and weights.
        tp_rank: the rank.
        copies: by group, how many ranks keep the same, see `GroupLayout.copies`; none: each is the only one.
    """
    return KVLayout(
        tuple(
            GroupLayout(
                kind=spec.kind,
                layers=spec.layers,
                block_size=spec.block_size,
                num_kv_heads=spec.num_kv_heads,
                head_size=spec.head_size,
                dtype=str(spec.dtype).removeprefix("torch."),
                window=spec.window,
                order=",".join(spec.layout.dims),
                shape=spec.layout.block_shape,
                copies=count,
            )
            for spec, count in zip(groups, copies or [1] * len(groups), strict=True)
        ),
        tp_size,
        identity,
        tp_rank,
    )


def allocate_kv_caches(
    config: WorkerConfig,
    groups: Sequence[KVCacheSpec],
    max_model_len: int,
    profile: Callable[[], object] | None = None,
    agree_min: Callable[[int], int] = int,
) -> list[torch.Tensor]:
    """A cache for each group, of the size that `plan_kv_cache` finds, which is logged.

    Raises:
        ConfigError: see `plan_kv_cache`.
    """
    plan = plan_kv_cache(config, groups, max_model_len, profile, agree_min)
    logger.info("%s: %s", config.name, plan)
    return [spec.allocate(count, config.device) for spec, count in zip(groups, plan.counts, strict=True)]


def allocate_groups(
    groups: Sequence[KVCacheSpec], num_blocks: int | Sequence[int], device: torch.device | str
) -> list[torch.Tensor]:
    """A cache for each group in which sequences have so many blocks; with a window it has a null block besides."""
    counts = [num_blocks] * len(groups) if isinstance(num_blocks, int) else num_blocks
    return [spec.allocate(n + (spec.window is not None), device) for spec, n in zip(groups, counts, strict=True)]


def plan_kv_cache(
    config: WorkerConfig,
    groups: Sequence[KVCacheSpec],
    max_model_len: int,
    profile: Callable[[], object] | None = None,
    agree_min: Callable[[int], int] = int,
) -> KVCachePlan:
    """The size that the configuration gives, or that the worker's share of the memory leaves.

    On a GPU the share is `gpu_memory_utilization` of the card, less the weights, the most that `profile` needed, and
    the CUDA context; never more than is free. On a CPU it is a share of the host's, see `host_memory`. Groups with a
    window get what a full batch holds at once, and never room for more tokens than the others; these share the rest.

    Args:
        config: the worker's; the model is loaded already.
        groups: of the model's cache.
        max_model_len: tokens of the longest sequence.
        profile: runs the worker's largest batches, on a GPU, see `workers.runner.profile_run`; None: nothing is run.
        agree_min: the smallest of what all ranks of the worker have room for; each keeps as many blocks.

    Raises:
        ConfigError: the batches or the cache do not fit.
        CacheTooSmallError: the cache cannot hold a sequence of `max_model_len` tokens.
    """
    gpu = _measured(config, profile) if torch.device(config.device).type == "cuda" else None
    split = CacheSplit(groups, [most_blocks(config, spec, max_model_len) for spec in groups], config.max_num_seqs)
    longest = split.most_blocks[split.primary]
    num_blocks = _configured_blocks(config, split)
    if num_blocks is None:  # no more than a full batch of the longest sequences can use
        free = cache_share(host_memory(), config.host_memory_share) if gpu is None else _gpu_memory_share(config, gpu)
        num_blocks = min(split.blocks_that_fit(free), longest * config.max_num_seqs)
    elif gpu is not None and split.num_bytes(num_blocks) > gpu.available:
        raise ConfigError(
            f"{config.role} worker: a KV cache of {num_blocks} blocks takes {_gb(split.num_bytes(num_blocks))}, "
            f"{_gb(max(0, gpu.available))} of the GPU's {_gb(gpu.total)} are left beside the model and other "
            f"processes; lower {_size_key(config)}"
        )
    num_blocks = agree_min(num_blocks)
    block_size = groups[split.primary].block_size
    if num_blocks < longest:
        text = _too_small(config, block_size, num_blocks, max_model_len, longest, gpu)
        raise CacheTooSmallError(text, num_blocks * block_size)
    counts = split.counts(num_blocks)
    return KVCachePlan(num_blocks, num_blocks * block_size, split.num_bytes(num_blocks), gpu, counts)


def _configured_blocks(config: WorkerConfig, split: CacheSplit) -> int | None:
    if config.num_blocks is not None:
        return config.num_blocks
    return split.blocks_that_fit(config.kv_cache_bytes) if config.kv_cache_bytes is not None else None


def _measured(config: WorkerConfig, profile: Callable[[], object] | None) -> GpuMemory:
    try:
        return measure_gpu_memory(config.device, profile)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(config.device)
        raise ConfigError(
            f"{config.role} worker: its largest batch ({config.max_num_batched_tokens} tokens of prefill, "
            f"{config.max_num_seqs} sequences of decode) does not fit beside {_gb(torch.cuda.memory_allocated())} of "
            f"weights: the GPU has {_gb(free)} free of {_gb(total)}; lower {config.role}.max_num_batched_tokens or "
            f"{config.role}.max_num_seqs"
        ) from error


def _gpu_memory_share(config: WorkerConfig, gpu: GpuMemory) -> int:
    share = gpu.share(config.gpu_memory_utilization)
    if share <= 0:
        raise ConfigError(
            f"{config.role} worker: weights ({_gb(gpu.allocated)}), activations ({_gb(gpu.activations)}) and CUDA "
            f"({_gb(gpu.context)}) take {_gb(gpu.own)}, its share of the GPU is "
            f"{_gb(int(gpu.total * config.gpu_memory_utilization))} ({config.gpu_memory_utilization:g} of "
            f"{_gb(gpu.total)}) and leaves no KV cache; raise {config.role}.gpu_memory_utilization, or lower "
            f"{config.role}.max_num_batched_tokens"
        )
    if gpu.available <= 0:
        raise ConfigError(
            f"{config.role} worker: {_gb(gpu.free)} of the GPU's {_gb(gpu.total)} are free and leave no KV cache; "
            f"other processes use the card, or {config.role}.gpu_memory_utilization is too high for those that share it"
        )
    return min(share, gpu.available)


def _too_small(
    config: WorkerConfig, block_size: int, num_blocks: int, max_model_len: int, longest: int, gpu: GpuMemory | None
) -> str:
    role = config.role
    measured = ""
    larger = f"{role}.num_blocks or {role}.kv_cache_gb"
    if gpu is not None and config.num_blocks is None and config.kv_cache_bytes is None:
        kept = (
            f"{config.gpu_memory_utilization:g} of {_gb(gpu.total)}, {_gb(gpu.own)} of it taken, {_gb(gpu.free)} free"
        )
        measured, larger = f" ({kept})", f"{role}.gpu_memory_utilization"
    return (
        f"{role} worker: a KV cache of {num_blocks} blocks of {block_size} tokens{measured} cannot hold one "
        f"sequence of max_model_len {max_model_len} ({longest} blocks); enlarge {larger}, or lower "
        f"model.max_model_len to {num_blocks * block_size}"
    )


def _size_key(config: WorkerConfig) -> str:
    return f"{config.role}.{'num_blocks' if config.num_blocks is not None else 'kv_cache_gb'}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
