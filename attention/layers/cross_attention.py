"""Cross attention: decoder tokens to all tokens of an encoder, whose keys and values stay in the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attention.backend import AttentionBackend, KVScales
from attention.errors import AttentionInputError
from attention.forward_context import ForwardContext
from attention.layers.attention import Attention
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec, AttentionType


class CrossAttention(Attention):
    """Attention to an encoder's tokens.

    Keys and values of a sequence's encoder tokens are given once, in the sequence's first step, and found in the cache
    afterwards; `build_cross_metadata` says which tokens a batch brings. A batch that brings none passes None for both.

    Args:
        spec: the layer, `AttentionType.ENCODER_DECODER`.
        backend: how it attends.
        name: see `Attention`.
        sinks: see `Attention`.
        kv_scales: see `Attention`.

    Raises:
        AttentionInputError: the layer is of another type, or the backend has no cross attention.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: type[AttentionBackend],
        name: str,
        sinks: torch.Tensor | None = None,
        kv_scales: KVScales | None = None,
    ) -> None:
        if spec.attn_type is not AttentionType.ENCODER_DECODER:
            raise AttentionInputError(f"cross attention is {AttentionType.ENCODER_DECODER}, not {spec.attn_type}")
        if spec.attn_type not in backend.capabilities.attention_types:
            raise AttentionInputError(f"{backend.name} has no cross attention")
        super().__init__(spec, backend, name, sinks, kv_scales)

    def attend(
        self,
        context: ForwardContext,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Attention.attend`; `key` and `value` are of the encoder tokens that the batch brings, in order.

        Raises:
            AttentionInputError: those are others than the batch was built for.
        """
        metadata = context.metadata.get(self.name)
        brought = 0 if key is None else key.shape[0]
        if metadata is not None and brought != metadata.common.slot_mapping.shape[0]:
            expected = metadata.common.slot_mapping.shape[0]
            raise AttentionInputError(f"layer {self.name}: keys of {brought} encoder tokens, the batch has {expected}")
        if brought == 0:  # nothing to store, and no scales to be found from it
            key = value = None
        return super().attend(context, query, key, value, output)


def build_cross_metadata(
    query_lens: Sequence[int],
    encoder_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    device: torch.device | str = "cpu",
    first_step: Sequence[bool] | None = None,
) -> CommonAttentionMetadata:
    """Describe one batch of cross attention.

    Args:
        query_lens: decoder tokens of each sequence, at least 1.
        encoder_lens: encoder tokens of each sequence; 0 gives zeros.
        block_tables: blocks of each sequence's encoder tokens in order; more than they need are ignored.
        block_size: tokens in a block.
        device: where the tensors go.
        first_step: which sequences bring the keys and values of their encoder tokens; None: none does.

    Raises:
        AttentionInputError: the lists differ in length; a sequence without queries or with too few blocks.
    """
    first = [False] * len(query_lens) if first_step is None else list(first_step)
    if not len(query_lens) == len(encoder_lens) == len(block_tables) == len(first):
        raise AttentionInputError(
            f"{len(query_lens)} queries, {len(encoder_lens)} encoder lengths, {len(block_tables)} block tables, "
            f"{len(first)} first steps"
        )
    used = [-(-length // block_size) for length in encoder_lens]
    tables = np.zeros((len(used), max(used, default=0)), dtype=np.int32)
    slots = [np.empty(0, dtype=np.int64)]
    for i, (queries, length, blocks) in enumerate(zip(query_lens, encoder_lens, block_tables, strict=True)):
        if queries < 1 or length < 0 or len(blocks) < used[i]:
            raise AttentionInputError(
                f"sequence {i}: {queries} queries, {length} encoder tokens in {len(blocks)} blocks of {block_size}: "
                "needs at least 1 query and enough blocks"
            )
        tables[i, : used[i]] = blocks[: used[i]]
        if first[i]:
            positions = np.arange(length, dtype=np.int64)
            slots.append(tables[i, positions // block_size].astype(np.int64) * block_size + positions % block_size)
    offsets = np.zeros(len(query_lens) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=offsets[1:])
    return CommonAttentionMetadata(
        cu_seqlens_q=torch.from_numpy(offsets).to(device),
        seq_lens=torch.tensor(encoder_lens, dtype=torch.int32, device=device),
        block_tables=torch.from_numpy(tables).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
        query_lens=tuple(query_lens),
        context_lens=tuple(encoder_lens),
    )
