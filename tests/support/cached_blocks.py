"""What must hold of the blocks that workers keep by content."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from local_cluster import LocalCluster
from workers.block_hashes import block_hashes
from workers.decode_worker import DecodeWorker
from workers.kv_cache.block_pool import blocks_for
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner, Row

Workers = Iterable[PrefillWorker | DecodeWorker]


def poison_free_blocks(workers: Workers) -> None:
    """What a block without users and without known content holds must never matter."""
    for worker in workers:
        blocks = worker.blocks
        known = blocks.used_blocks.union(blocks.stored_blocks.values())
        free = [block for block in range(blocks.num_blocks) if block not in known]
        worker.runner.kv_cache[:, free] = torch.nan


def check_cached_blocks(cluster: LocalCluster, workers: Workers, texts: list[list[int]], rtol: float = 1e-4) -> int:
    """Every block that can be found holds what computing its tokens whole gives; how many there were."""
    checked = 0
    for worker in workers:
        runner, size = worker.runner, worker.runner.block_size
        for token_ids in texts:
            found = worker.blocks.find(block_hashes(token_ids, size))
            if not found:
                continue
            count = blocks_for(len(token_ids), size)
            whole = ModelRunner(cluster.model, cluster.model.kv_cache_spec.allocate(count, runner.device))
            whole.forward([Row(token_ids, 0, range(count))])
            kept, computed = runner.kv_cache[:, found], whole.kv_cache[:, : len(found)]
            torch.testing.assert_close(kept, computed, rtol=rtol, atol=rtol / 10)
            checked += len(found)
    return checked
