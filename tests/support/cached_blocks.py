"""What must hold of the blocks that workers keep by content."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cache_groups import group_caches
from local_cluster import LocalCluster
from workers.block_hashes import block_hashes
from workers.decode_worker import DecodeWorker
from workers.kv_cache.block_pool import blocks_for
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner, Row

Workers = Iterable[PrefillWorker | DecodeWorker]


def found_blocks(worker: PrefillWorker | DecodeWorker, token_ids: list[int], group: int = 0) -> list[int]:
    """The blocks of the longest beginning of these tokens that can be found in one of the worker's cache groups."""
    cache = worker.cache.groups[group]
    return cache.pool.find(block_hashes(token_ids, cache.block_size))


def poison_free_blocks(workers: Workers) -> None:
    """What a block without users and without known content holds must never matter."""
    for worker in workers:
        for group, kv_cache in zip(worker.cache.groups, worker.runner.kv_caches, strict=True):
            known = group.pool.used_blocks.union(group.pool.stored_blocks.values())
            ids = range(kv_cache.shape[1] - group.pool.num_blocks, kv_cache.shape[1])  # a null block stays zero
            kv_cache[:, [block for block in ids if block not in known]] = torch.nan


def check_cached_blocks(cluster: LocalCluster, workers: Workers, texts: list[list[int]], rtol: float = 1e-4) -> int:
    """Every block that can be found holds what computing its tokens whole gives; how many there were."""
    checked = 0
    for worker in workers:
        for text in texts:
            whole = None
            for group, (cache, kv_cache) in enumerate(zip(worker.cache.groups, worker.runner.kv_caches, strict=True)):
                here = cache.pool.find_each(block_hashes(text, cache.block_size))
                places = [place for place, block in enumerate(here) if block is not None]
                if not places:
                    continue
                whole = computed_whole(cluster, text) if whole is None else whole
                kept = kv_cache[:, [here[place] for place in places]]
                first = whole.kv_caches[group].shape[1] - blocks_for(len(text), cache.block_size)
                computed = whole.kv_caches[group][:, [first + place for place in places]]
                torch.testing.assert_close(kept, computed, rtol=rtol, atol=rtol / 10)
                checked += len(places)
    return checked


def computed_whole(cluster: LocalCluster, token_ids: list[int]) -> ModelRunner:
    """A model whose cache holds all of these tokens, in blocks in order."""
    model = cluster.model
    counts = [blocks_for(len(token_ids), spec.block_size) for spec in model.kv_cache_groups]
    whole = ModelRunner(model, group_caches(model, counts))
    tables = [
        range(cache.shape[1] - count, cache.shape[1]) for cache, count in zip(whole.kv_caches, counts, strict=True)
    ]
    whole.forward([Row(token_ids, 0, tables)])
    return whole
