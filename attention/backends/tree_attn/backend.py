"""TREE_ATTN: draft trees of speculative decoding, without a mask over the context.

Every node of a tree sees the whole context before it, and that is nearly all of the keys: they are attended to by an
ordinary kernel that knows of no mask. The tree itself is a dense little square. Both are merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, refuse_masks
from attention.backends.common.batch_split import token_slots
from attention.backends.triton_attn.backend import POWERS_OF_TWO, TRITON_DEVICES, flat_mask, slopes_tensor
from attention.capability import FLOATS, X86, Capabilities, DeviceSupport, Sizes
from attention.metadata import CommonAttentionMetadata
from attention.ops import torch_attention
from attention.ops.dispatch import uses_triton
from attention.ops.merge_attn_states import apply_sinks, merge_attn_states
from attention.ops.paged_attention import PagedAttention
from attention.ops.torch_attention import Scores
from attention.platform import DeviceKind
from attention.spec import AttentionSpec, Feature


@dataclass(frozen=True)
class TreePlan:
    """A batch of trees.

    Attributes:
        mask: (n, n) bool on the batch's device.
        positions: (B, n) int64, of the nodes in their sequences.
        before: (B,) int32, tokens before the trees.
        flat: what `paged_prefill` takes as mask, mask offsets and window, where the distances between nodes and context
            matter: then the Triton kernel does all at once. None: context and tree are attended to apart.
    """

    mask: torch.Tensor
    positions: torch.Tensor
    before: torch.Tensor
    flat: tuple[torch.Tensor, torch.Tensor, int | None] | None


@dataclass(frozen=True)
class TreeAttnMetadata(AttentionMetadata):
    """A planned batch.

    Attributes:
        scores: how queries score keys.
        tree: set where the batch has a tree mask.
    """

    scores: Scores
    tree: TreePlan | None


class TreeAttnMetadataBuilder(AttentionMetadataBuilder):
    """Finds where the context ends and the trees begin."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._scores = Scores(
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            soft_cap=spec.logits_soft_cap,
            alibi_slopes=slopes_tensor(spec, device),
        )

    def build(self, common: CommonAttentionMetadata) -> TreeAttnMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, TreeAttnBackend.capabilities.features, TreeAttnBackend.name)
        return TreeAttnMetadata(common, self._scores, self._plan(common) if common.tree_mask is not None else None)

    def _plan(self, common: CommonAttentionMetadata) -> TreePlan:
        assert common.tree_mask is not None
        device = common.seq_lens.device
        nodes = common.tree_mask.shape[0]
        before = common.seq_lens - nodes
        by_distance = self.spec.sliding_window is not None or self.spec.alibi_slopes is not None
        return TreePlan(
            mask=common.tree_mask.to(device),
            positions=before.long()[:, None] + torch.arange(nodes, device=device),
            before=before,
            flat=flat_mask(common, self.spec.sliding_window) if by_distance and uses_triton(before) else None,
        )


class TreeAttnImpl(AttentionImpl):
    """Ordinary paged attention, and trees."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`."""
        assert isinstance(metadata, TreeAttnMetadata)
        assert kv_cache is not None
        common, scores = metadata.common, metadata.scores
        if output is None:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if query.shape[0] == 0:
            return output
        if key is not None and value is not None:
            PagedAttention.write_to_paged_cache(key, value, kv_cache, common.slot_mapping, self.kv_scales)
        if metadata.tree is not None:
            self._attend_tree(query, kv_cache, metadata, metadata.tree, output)
        elif common.decode_only:
            PagedAttention.forward_decode(
                query, kv_cache, common.block_tables, common.seq_lens, common.max_seq_len, scores,
                sinks=self.sinks, scales=self.kv_scales, output=output,
            )  # fmt: skip
        else:
            PagedAttention.forward_prefix(
                query, kv_cache, common.block_tables, common.cu_seqlens_q, common.seq_lens, common.max_query_len,
                scores, sinks=self.sinks, scales=self.kv_scales, output=output,
            )  # fmt: skip
        return output

    def _attend_tree(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TreeAttnMetadata,
        tree: TreePlan,
        output: torch.Tensor,
    ) -> None:
        if tree.flat is not None:
            self._attend_masked(query, kv_cache, metadata, tree.flat, output)
            return
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        context_lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        self._attend_context(query, kv_cache, metadata, tree, context, context_lse)
        nodes, nodes_lse = self._attend_nodes(query, kv_cache, metadata, tree)
        merge_attn_states(output, context, context_lse, nodes, nodes_lse)

    def _attend_context(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TreeAttnMetadata,
        tree: TreePlan,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        common, scores = metadata.common, metadata.scores
        if uses_triton(query):
            from attention.ops.triton.prefill import paged_prefill

            paged_prefill(
                query, kv_cache, common.cu_seqlens_q, tree.before, common.block_tables, common.max_query_len, output,
                scale=scores.scale, causal=False, soft_cap=scores.soft_cap,
                k_scale=self.kv_scales.k, v_scale=self.kv_scales.v, lse=lse,
            )  # fmt: skip
        else:
            torch_attention.paged_prefix(
                query, kv_cache, common.cu_seqlens_q, common.seq_lens, common.block_tables, output, scores,
                scales=self.kv_scales, lse=lse, before_queries=True,
            )  # fmt: skip

    def _attend_nodes(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: TreeAttnMetadata, tree: TreePlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, Hq, D) of the query's dtype and (T, Hq): trees alone, with sinks; the keys as the cache holds them."""
        shape = tree.positions.shape
        key, value = torch_attention.gather(
            kv_cache, token_slots(metadata.common, kv_cache.shape[2]).view(shape), self.kv_scales
        )
        attended, lse = torch_attention.attend(
            query.unflatten(0, shape), key, value, tree.positions, tree.positions,
            Scores(metadata.scores.scale, soft_cap=metadata.scores.soft_cap, alibi_slopes=metadata.scores.alibi_slopes),
            tree.mask,
        )  # fmt: skip
        if self.sinks is not None:
            attended, lse = apply_sinks(attended, lse, self.sinks)
        return attended.flatten(0, 1).to(query.dtype), lse.flatten(0, 1)

    def _attend_masked(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TreeAttnMetadata,
        flat: tuple[torch.Tensor, torch.Tensor, int | None],
        output: torch.Tensor,
    ) -> None:
        from attention.ops.triton.prefill import paged_prefill

        common, scores = metadata.common, metadata.scores
        mask, offsets, window = flat
        paged_prefill(
            query, kv_cache, common.cu_seqlens_q, common.seq_lens, common.block_tables, common.max_query_len, output,
            scale=scores.scale, sliding_window=window, soft_cap=scores.soft_cap, alibi_slopes=scores.alibi_slopes,
            sinks=self.sinks, k_scale=self.kv_scales.k, v_scale=self.kv_scales.v, mask=mask, mask_offsets=offsets,
        )  # fmt: skip


class TreeAttnBackend(AttentionBackend):
    """The Triton kernels on a GPU, plain torch on a CPU."""

    name = "TREE_ATTN"
    impl_class = TreeAttnImpl
    metadata_class = TreeAttnMetadata
    builder_class = TreeAttnMetadataBuilder
    capabilities = Capabilities(
        devices=(
            *(support for support in TRITON_DEVICES if support.kind is not DeviceKind.CPU),
            DeviceSupport(DeviceKind.CPU, ran_on=(X86,)),
        ),
        dtypes=FLOATS,
        head_sizes=Sizes(high=256),
        block_sizes=POWERS_OF_TWO,
        features=frozenset(
            {
                Feature.GQA,
                Feature.PREFIX,
                Feature.SLIDING_WINDOW,
                Feature.ALIBI,
                Feature.SOFT_CAP,
                Feature.SINKS,
                Feature.FP8_KV,
                Feature.TREE_MASK,
            }
        ),
        refused={
            Feature.NON_CAUSAL: "draft trees are for decoders",
            Feature.CUSTOM_MASK: "attends to the context without a mask",
        },
    )
