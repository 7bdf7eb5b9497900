"""From lists that a scheduler keeps to the tensors that a backend reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attention.backend import AttentionMetadata


def build_metadata(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    device: torch.device | str = "cpu",
) -> AttentionMetadata:
    """Describe one batch.

    Args:
        query_lens: tokens that each sequence brings, at least 1.
        context_lens: tokens that each sequence has with them included.
        block_tables: blocks of each sequence in order; more than its tokens need are ignored.
        block_size: tokens in a block.
        device: where the tensors go.

    Raises:
        ValueError: the lists differ in length, or a sequence brings no token, more than it has, or too few blocks.
    """
    if not len(query_lens) == len(context_lens) == len(block_tables):
        raise ValueError(f"{len(query_lens)} queries, {len(context_lens)} contexts, {len(block_tables)} block tables")
    used = [-(-context // block_size) for context in context_lens]
    tables = np.zeros((len(used), max(used, default=0)), dtype=np.int32)
    slots = []
    for i, (query, context, blocks) in enumerate(zip(query_lens, context_lens, block_tables, strict=True)):
        if not 1 <= query <= context or len(blocks) < used[i]:
            raise ValueError(
                f"sequence {i}: {query} of {context} tokens in {len(blocks)} blocks of {block_size}: "
                "needs 1 <= query <= context and enough blocks"
            )
        tables[i, : used[i]] = blocks[: used[i]]
        positions = np.arange(context - query, context, dtype=np.int64)
        slots.append(tables[i, positions // block_size].astype(np.int64) * block_size + positions % block_size)
    cu_seqlens = np.zeros(len(used) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=cu_seqlens[1:])
    slot_mapping = np.concatenate(slots) if slots else np.zeros(0, dtype=np.int64)
    return AttentionMetadata(
        cu_seqlens_q=torch.from_numpy(cu_seqlens).to(device),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=torch.from_numpy(tables).to(device),
        slot_mapping=torch.from_numpy(slot_mapping).to(device),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
    )
