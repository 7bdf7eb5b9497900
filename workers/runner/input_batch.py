"""What a batch is to the model: its tokens, their positions, and where their keys and values go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from attention.metadata import CommonAttentionMetadata, build_metadata
from workers.host_copies import to_device_together


@dataclass(frozen=True)
class Row:
    """One sequence's share of a batch.

    Attributes:
        token_ids: tokens to compute; an array of int64 is taken as it is, which saves time.
        start: tokens of the sequence that are in the cache already.
        block_tables: for each cache group its blocks, in order.
        wants_logits: whether the logits after its last token are wanted.
    """

    token_ids: Sequence[int] | np.ndarray
    start: int
    block_tables: Sequence[Sequence[int]]
    wants_logits: bool = True


@dataclass(frozen=True)
class BatchInputs:
    """A batch on the device.

    Attributes:
        input_ids: (T,) int64.
        positions: (T,) int64, of each token in its sequence.
        metadata: the sequences, for each cache group; they differ in block tables and slots.
        wanted: (N,) int64, places of the tokens after which logits are wanted; None: after every one.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: tuple[CommonAttentionMetadata, ...]
    wanted: torch.Tensor | None


def batch_inputs(rows: Sequence[Row], block_sizes: Sequence[int], device: torch.device) -> BatchInputs:
    """Describe a batch of at least one row; one copy takes all of it to a GPU, and nobody waits for it.

    Args:
        rows: the batch.
        block_sizes: tokens in a block of each cache group.
        device: where it goes.
    """
    query_lens = [len(row.token_ids) for row in rows]
    context_lens = [row.start + length for row, length in zip(rows, query_lens, strict=True)]
    groups = [
        build_metadata(query_lens, context_lens, [row.block_tables[i] for row in rows], block_size)
        for i, block_size in enumerate(block_sizes)
    ]
    input_ids = np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for row in rows])
    positions = np.concatenate([np.arange(row.start, end) for row, end in zip(rows, context_lens, strict=True)])
    last = np.cumsum(query_lens) - 1
    wanted = last[[row.wants_logits for row in rows]]
    host = [torch.from_numpy(input_ids), torch.from_numpy(positions), torch.from_numpy(wanted)]
    host += [groups[0].cu_seqlens_q, groups[0].seq_lens]
    for group in groups:
        host += [group.block_tables, group.slot_mapping]
    ids, places, ends, cu_seqlens_q, seq_lens, *own = to_device_together(host, device)
    metadata = tuple(
        replace(group, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_tables=tables, slot_mapping=slots)
        for group, tables, slots in zip(groups, own[::2], own[1::2], strict=True)
    )
    return BatchInputs(ids, places, metadata, ends if len(ends) < len(ids) else None)
