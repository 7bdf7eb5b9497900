"""One batch of sequences, described once for all layers and all backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from attention.errors import AttentionInputError
from attention.spec import Feature


@dataclass(frozen=True)
class CommonAttentionMetadata:
    """One batch. Queries are packed: no padding anywhere.

    A sequence of `seq_lens[i]` tokens brings its last `cu_seqlens_q[i + 1] - cu_seqlens_q[i]` tokens as queries; the
    earlier ones are in the cache already (an earlier chunk, or the prompt when decoding). In cross attention
    `seq_lens` counts the encoder's tokens, and queries have nothing to do with them.

    Attributes:
        cu_seqlens_q: (B + 1,) int32, where each sequence's queries begin in T.
        seq_lens: (B,) int32, keys of each sequence, this batch's tokens included.
        block_tables: (B, max_blocks) int32, the blocks of each sequence in order; padded with 0. (B, 0) where nothing
            is cached.
        slot_mapping: (Tk,) int64, `block * block_size + offset` where each new key and value is stored; a negative one
            stores nothing (the padding rows of a captured graph, say). Keys are read by way of the block tables alone.
        query_lens: the lengths behind `cu_seqlens_q`, as Python ints.
        context_lens: `seq_lens` as Python ints.
        tree_mask: (n, n) bool: every sequence brings exactly n queries, the nodes of one draft tree; node i sees all of
            the context before the tree and the nodes j of row i that are True. Parents come before children.
        custom_mask: (sum of query_lens[i] * context_lens[i],) bool, sequence after sequence, row by row: True where a
            query sees a key. Takes the place of the causal rule.
        common_prefix_len: tokens, whole blocks, that all sequences have in common (the same blocks in the same
            order), for backends that can attend to them once for all (cascade); 0 promises nothing.
        lasting: whether the batch runs again and again as it is, because it is captured in a CUDA graph: a plan of it
            must stay good when other batches are planned.
    """

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    tree_mask: torch.Tensor | None = None
    custom_mask: torch.Tensor | None = None
    common_prefix_len: int = 0
    lasting: bool = False

    @property
    def num_seqs(self) -> int:
        """B."""
        return len(self.query_lens)

    @cached_property
    def max_query_len(self) -> int:
        """Most tokens that a sequence brings; 0 for an empty batch."""
        return max(self.query_lens, default=0)

    @cached_property
    def max_seq_len(self) -> int:
        """Most tokens that a sequence has; 0 for an empty batch."""
        return max(self.context_lens, default=0)

    @cached_property
    def decode_only(self) -> bool:
        """Whether every sequence brings exactly one token."""
        return all(n == 1 for n in self.query_lens)

    @property
    def features(self) -> frozenset[Feature]:
        """The masks that this batch brings; a common prefix is an offer, not a demand."""
        asked = {Feature.TREE_MASK: self.tree_mask is not None, Feature.CUSTOM_MASK: self.custom_mask is not None}
        return frozenset(feature for feature, needed in asked.items() if needed)


def cumulative_lens(lens: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(n + 1,) int32: where each of so many lengths begins, and the end of the last."""
    found = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=found[1:])
    return torch.from_numpy(found).to(device)


def build_metadata(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    device: torch.device | str = "cpu",
    *,
    tree_mask: torch.Tensor | None = None,
    custom_mask: torch.Tensor | None = None,
    common_prefix_len: int = 0,
) -> CommonAttentionMetadata:
    """Describe one batch of a decoder, whose new tokens go into the cache.

    Args:
        query_lens: tokens that each sequence brings, at least 1.
        context_lens: tokens that each sequence has with them included.
        block_tables: blocks of each sequence in order; more than its tokens need are ignored.
        block_size: tokens in a block.
        device: where the tensors go.
        tree_mask: see `CommonAttentionMetadata`.
        custom_mask: see `CommonAttentionMetadata`.
        common_prefix_len: see `CommonAttentionMetadata`.

    Raises:
        AttentionInputError: the lists differ in length; a sequence brings no token, more than it has, or too few
            blocks; a mask of another shape; a common prefix that is not whole blocks or not common.
    """
    if not len(query_lens) == len(context_lens) == len(block_tables):
        raise AttentionInputError(
            f"{len(query_lens)} queries, {len(context_lens)} contexts, {len(block_tables)} block tables"
        )
    used = [-(-context // block_size) for context in context_lens]
    tables = np.zeros((len(used), max(used, default=0)), dtype=np.int32)
    slots = []
    for i, (query, context, blocks) in enumerate(zip(query_lens, context_lens, block_tables, strict=True)):
        if not 1 <= query <= context or len(blocks) < used[i]:
            raise AttentionInputError(
                f"sequence {i}: {query} of {context} tokens in {len(blocks)} blocks of {block_size}: "
                "needs 1 <= query <= context and enough blocks"
            )
        tables[i, : used[i]] = blocks[: used[i]]
        positions = np.arange(context - query, context, dtype=np.int64)
        slots.append(tables[i, positions // block_size].astype(np.int64) * block_size + positions % block_size)
    _check_masks(query_lens, context_lens, tree_mask, custom_mask)
    _check_common_prefix(common_prefix_len, query_lens, context_lens, tables, block_size)
    slot_mapping = np.concatenate(slots) if slots else np.empty(0, dtype=np.int64)
    return CommonAttentionMetadata(
        cu_seqlens_q=cumulative_lens(query_lens, device),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=torch.from_numpy(tables).to(device),
        slot_mapping=torch.from_numpy(slot_mapping).to(device),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        tree_mask=tree_mask,
        custom_mask=custom_mask,
        common_prefix_len=common_prefix_len,
    )


def build_encoder_metadata(query_lens: Sequence[int], device: torch.device | str = "cpu") -> CommonAttentionMetadata:
    """Describe one batch of an encoder: whole sequences, nothing cached.

    Raises:
        AttentionInputError: a sequence brings no token.
    """
    if min(query_lens, default=1) < 1:
        raise AttentionInputError(f"a sequence brings at least 1 token, not {min(query_lens)}")
    return CommonAttentionMetadata(
        cu_seqlens_q=cumulative_lens(query_lens, device),
        seq_lens=torch.tensor(query_lens, dtype=torch.int32, device=device),
        block_tables=torch.zeros((len(query_lens), 0), dtype=torch.int32, device=device),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
        query_lens=tuple(query_lens),
        context_lens=tuple(query_lens),
    )


def _check_masks(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tree_mask: torch.Tensor | None,
    custom_mask: torch.Tensor | None,
) -> None:
    if tree_mask is not None:
        nodes = tree_mask.shape[0]
        if tree_mask.shape != (nodes, nodes) or any(n != nodes for n in query_lens):
            raise AttentionInputError(
                f"a tree mask of shape {tuple(tree_mask.shape)} for queries of {sorted(set(query_lens))} tokens"
            )
    if custom_mask is not None:
        expected = sum(q * c for q, c in zip(query_lens, context_lens, strict=True))
        if custom_mask.shape != (expected,):
            raise AttentionInputError(f"a custom mask of shape {tuple(custom_mask.shape)}, expected ({expected},)")
    if tree_mask is not None and custom_mask is not None:
        raise AttentionInputError("a batch has a tree mask or a custom mask, not both")


def _check_common_prefix(
    length: int, query_lens: Sequence[int], context_lens: Sequence[int], tables: np.ndarray, block_size: int
) -> None:
    if length == 0:
        return
    shortest = min((c - q for q, c in zip(query_lens, context_lens, strict=True)), default=0)
    blocks, rest = divmod(length, block_size)
    if length < 0 or rest or length > shortest:
        raise AttentionInputError(
            f"a common prefix of {length} tokens: needs whole blocks of {block_size}, "
            f"at most the {shortest} tokens that every sequence has in the cache"
        )
    if not (tables[:, :blocks] == tables[:1, :blocks]).all():
        raise AttentionInputError(f"the first {blocks} blocks are not the same in all sequences")
