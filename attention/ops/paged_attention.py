"""`PagedAttention`: storing into the paged cache and attending over it, without backend, builder or metadata.

The names are those that vLLM's users know; the cache is one tensor, see `AttentionBackend.get_kv_cache_shape`. On a GPU
(and in Triton's interpreter) the work is done by the Triton kernels, else by their twins in `torch_attention`.
"""

from __future__ import annotations

import torch

from attention import kv_cache as storage
from attention.backend import AttentionBackend, KVScales
from attention.errors import AttentionInputError
from attention.ops import torch_attention
from attention.ops.dispatch import uses_triton
from attention.ops.torch_attention import Scores

PARTITION_SIZE = torch_attention.TILE
"""Keys of a partition of V2."""

_V1_MAX_SEQ_LEN = 8192
_V1_MIN_PROGRAMS = 512


class PagedAttention:
    """Operations on one layer's cache, (num_blocks, 2, block_size, Hkv, D)."""

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """See `AttentionBackend.get_kv_cache_shape`."""
        return AttentionBackend.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def use_v1(max_seq_len: int, num_seqs: int, num_heads: int) -> bool:
        """Whether decode should go over the keys in one pass (V1), or in partitions that are merged (V2).

        V2 is for few sequences with long contexts, which would leave most of a device idle. The rule is vLLM's: V1 up
        to 8192 tokens, when there is one partition anyway or when sequences times heads exceed 512.

        Args:
            max_seq_len: tokens of the longest sequence.
            num_seqs: B.
            num_heads: Hq.
        """
        partitions = -(-max_seq_len // PARTITION_SIZE)
        return max_seq_len <= _V1_MAX_SEQ_LEN and (partitions == 1 or num_seqs * num_heads > _V1_MIN_PROGRAMS)

    @staticmethod
    def write_to_paged_cache(
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: KVScales = KVScales(),  # noqa: B008 (frozen)
    ) -> None:
        """Write each token's key and value into its slot.

        Args:
            key: (T, Hkv, D).
            value: (T, Hkv, D).
            kv_cache: written.
            slot_mapping: (T,) int64, `block * block_size + offset`, all different; a negative one skips its token.
            scales: of an FP8 cache.

        Raises:
            AttentionInputError: arguments that do not fit each other.
        """
        if uses_triton(kv_cache):
            from attention.ops.triton.reshape_and_cache import reshape_and_cache

            reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale=scales.k, v_scale=scales.v)
        else:
            storage.reshape_and_cache(key, value, kv_cache, slot_mapping, scales)

    @staticmethod
    def forward_decode(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        scores: Scores,
        *,
        sinks: torch.Tensor | None = None,
        scales: KVScales = KVScales(),  # noqa: B008 (frozen)
        output: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        version: int | None = None,
    ) -> torch.Tensor:
        """Attend with one query for each sequence, its last token, whose key is in the cache already.

        Args:
            query: (B, Hq, D) float16, bfloat16 or float32.
            kv_cache: of the query's dtype, or float8_e4m3fn.
            block_tables: (B, max_blocks) int32.
            seq_lens: (B,) int32; 0 gives zeros.
            max_seq_len: of the longest sequence.
            scores: how queries score keys; whether it is causal makes no difference.
            sinks: (Hq,) float32, one logit more in each head's softmax, of no value; None: none.
            scales: of an FP8 cache.
            output: (B, Hq, D), written and returned when given.
            lse: (B, Hq) float32; when given, the natural logarithms of the softmaxes' denominators are written to it,
                -inf where there is none.
            version: 1 or 2; None: as `use_v1` says.

        Raises:
            AttentionInputError: another version.
        """
        if version not in (None, 1, 2):
            raise AttentionInputError(f"paged attention has versions 1 and 2, not {version}")
        output = _allocated(output, query)
        partitioned = version == 2 or (
            version is None and not PagedAttention.use_v1(max_seq_len, query.shape[0], query.shape[1])
        )
        if query.shape[0] == 0:
            return output
        if uses_triton(query):
            from attention.ops.triton.decode import paged_decode
            from attention.ops.triton.tuning import MAX_SPLITS

            partitions = min(MAX_SPLITS, max(1, -(-max_seq_len // PARTITION_SIZE)))
            paged_decode(
                query, kv_cache, block_tables, seq_lens, max_seq_len, output,
                scale=scores.scale, sliding_window=scores.sliding_window, soft_cap=scores.soft_cap,
                alibi_slopes=scores.alibi_slopes, sinks=sinks, k_scale=scales.k, v_scale=scales.v, lse=lse,
                num_splits=partitions if partitioned else 1,
            )  # fmt: skip
        else:
            torch_attention.paged_decode(
                query, kv_cache, block_tables, seq_lens, output, scores,
                sinks=sinks, scales=scales, lse=lse, partitioned=partitioned,
            )  # fmt: skip
        return output

    @staticmethod
    def forward_prefix(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor,
        max_query_len: int,
        scores: Scores,
        *,
        sinks: torch.Tensor | None = None,
        scales: KVScales = KVScales(),  # noqa: B008 (frozen)
        output: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with the last tokens of each sequence; all keys, the queries' own too, are in the cache already.

        Args:
            query: (T, Hq, D) float16, bfloat16 or float32.
            kv_cache: of the query's dtype, or float8_e4m3fn.
            block_tables: (B, max_blocks) int32.
            cu_seqlens_q: (B + 1,) int32, where each sequence's queries begin in T.
            seq_lens: (B,) int32, keys of each sequence, those of the queries included.
            max_query_len: of the longest sequence of queries.
            scores: how queries score keys.
            sinks: see `forward_decode`.
            scales: of an FP8 cache.
            output: (T, Hq, D), written and returned when given.
            lse: (T, Hq) float32, see `forward_decode`.
        """
        output = _allocated(output, query)
        if query.shape[0] == 0:
            return output
        if uses_triton(query):
            from attention.ops.triton.prefill import paged_prefill

            paged_prefill(
                query, kv_cache, cu_seqlens_q, seq_lens, block_tables, max_query_len, output,
                scale=scores.scale, causal=scores.causal, sliding_window=scores.sliding_window,
                soft_cap=scores.soft_cap, alibi_slopes=scores.alibi_slopes, sinks=sinks,
                k_scale=scales.k, v_scale=scales.v, lse=lse,
            )  # fmt: skip
        else:
            torch_attention.paged_prefix(
                query, kv_cache, cu_seqlens_q, seq_lens, block_tables, output, scores,
                sinks=sinks, scales=scales, lse=lse,
            )  # fmt: skip
        return output


def _allocated(output: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format) if output is None else output
