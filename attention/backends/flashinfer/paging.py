"""A batch in FlashInfer's terms: pages of each sequence end to end, and masks written out.

Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from attention.metadata import CommonAttentionMetadata, cumulative_lens


@dataclass(frozen=True)
class Pages:
    """Pages of each sequence, end to end.

    Attributes:
        indptr: (B + 1,) int32 on the host, where each sequence's pages begin.
        indices: (indptr[-1],) int32 on the device, the pages.
        last_page_len: (B,) int32 on the host, tokens in each sequence's last page.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


class PagedSequences(Protocol):
    """Sequences of a batch, all or some, as `CommonAttentionMetadata` describes them."""

    @property
    def num_seqs(self) -> int:
        """B."""
        ...

    @property
    def context_lens(self) -> tuple[int, ...]:
        """Tokens that each has."""
        ...

    @property
    def seq_lens(self) -> torch.Tensor:
        """The same, (B,) int32 on the device."""
        ...

    @property
    def block_tables(self) -> torch.Tensor:
        """(B, max_blocks) int32."""
        ...


def list_pages(common: PagedSequences, block_size: int, skipped: int = 0) -> Pages:
    """The pages of every sequence.

    Args:
        common: the sequences.
        block_size: tokens in a block.
        skipped: blocks at the beginning of every sequence to leave out.
    """
    lens = np.asarray(common.context_lens, dtype=np.int64) - skipped * block_size
    counts = -(-lens // block_size)
    indptr = cumulative_lens(counts)
    total = int(indptr[-1])
    device = common.block_tables.device
    begins = torch.zeros(common.num_seqs + 1, dtype=torch.int64, device=device)
    counted = (common.seq_lens + (block_size - 1)) // block_size - skipped
    torch.cumsum(counted, 0, out=begins[1:])
    owners = torch.repeat_interleave(torch.arange(common.num_seqs, device=device), counted.long(), output_size=total)
    columns = torch.arange(total, device=device) - begins[owners] + skipped
    last = torch.from_numpy((lens - (counts - 1) * block_size).astype(np.int32))
    return Pages(indptr, common.block_tables[owners, columns], last)


def common_pages(common: CommonAttentionMetadata, block_size: int) -> Pages:
    """The pages of the common prefix, as one sequence of whole pages."""
    count = common.common_prefix_len // block_size
    indptr = torch.tensor([0, count], dtype=torch.int32)
    last = torch.tensor([block_size], dtype=torch.int32)
    return Pages(indptr, common.block_tables[0, :count].contiguous(), last)


def written_out(common: CommonAttentionMetadata, window: int | None) -> torch.Tensor | None:
    """The batch's mask as a custom mask, (sum of query_lens[i] * context_lens[i],) bool; None: it has none.

    A tree's nodes see the context before the tree within the layer's window, and of the tree what its mask says.
    """
    tree = common.tree_mask
    if tree is None:
        return common.custom_mask
    nodes, device = tree.shape[0], tree.device
    areas = [nodes * length for length in common.context_lens]
    total = sum(areas)
    begins = torch.from_numpy(np.concatenate(([0], np.cumsum(areas)))).to(device)
    lens = common.seq_lens.long()
    owners = torch.repeat_interleave(torch.arange(common.num_seqs, device=device), lens * nodes, output_size=total)
    inside = torch.arange(total, device=device) - begins[owners]
    keys = lens[owners]
    rows, columns = inside // keys, inside % keys
    node = columns - (keys - nodes)
    seen = tree.flatten()[rows * nodes + node.clamp_min(0)]
    before = node < 0
    if window is not None:
        before_and_near = before & (rows - node < window)
        return torch.where(before, before_and_near, seen)
    return before | seen
