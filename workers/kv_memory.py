"""How large a worker's KV cache is, and how it is described to peers."""

from __future__ import annotations

import os

import torch

from attention.kv_cache import KVCacheSpec
from kv_transfer.layout import KVLayout
from workers.block_manager import blocks_for
from workers.config import WorkerConfig
from workers.errors import ConfigError

_CPU_MEMORY_SHARE = 0.1
_CUDA_MEMORY_SHARE = 0.85


def kv_layout(spec: KVCacheSpec) -> KVLayout:
    """The cache as two workers compare it when they meet."""
    return KVLayout(
        kind="mha",
        num_layers=spec.num_layers,
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=str(spec.dtype).removeprefix("torch."),
    )


def allocate_kv_cache(config: WorkerConfig, spec: KVCacheSpec, max_model_len: int) -> torch.Tensor:
    """A cache of the size that the configuration gives, or that fits in a share of the free memory.

    Raises:
        ConfigError: it cannot hold one sequence of `max_model_len` tokens.
    """
    longest = blocks_for(max_model_len, spec.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_bytes is not None:
        num_blocks = spec.blocks_that_fit(config.kv_cache_bytes)
    else:  # no more than a full batch of the longest sequences can use
        num_blocks = min(spec.blocks_that_fit(_free_memory_share(config.device)), longest * config.max_num_seqs)
    if num_blocks < longest:
        raise ConfigError(
            f"{config.role} worker: a KV cache of {num_blocks} blocks of {spec.block_size} tokens cannot hold one "
            f"sequence of max_model_len {max_model_len} ({longest} blocks); enlarge {config.role}.num_blocks or "
            f"{config.role}.kv_cache_gb, or lower model.max_model_len"
        )
    return spec.allocate(num_blocks, config.device)


def _free_memory_share(device: str) -> int:
    """Bytes that a KV cache may take when nobody has said."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * _CUDA_MEMORY_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_MEMORY_SHARE)
