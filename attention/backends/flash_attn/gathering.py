"""When keys are copied out of their pages before they are attended to, though the kernel could read them there.

A kernel loads keys that lie in one piece faster than keys in pages, by a few percent of its time, which is the number
of queries times that of keys. Copying them takes a time like the number of keys. So it pays from a number of queries
on that see a key; as the heads of a group read the same key, that is the number of query heads. With a loss of L
seconds a pair of query head and key, and C seconds to copy one head's key and value, from C / L query heads on.
"""

from __future__ import annotations

import torch

from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec

_MOST_BYTES = 256 << 20
"""Keys and values of a layer that are copied at most; they live as long as its attention takes."""


def should_gather(
    gather_from: int | None, common: CommonAttentionMetadata, spec: AttentionSpec, dtype: torch.dtype
) -> bool:
    """Whether a batch's keys are to be copied out of the cache.

    Args:
        gather_from: of the provider: query heads that must see a key on average, weighted by keys; None: never.
        common: the batch.
        spec: the layer.
        dtype: of the cache.
    """
    keys = sum(common.context_lens)
    if gather_from is None or keys == 0:
        return False
    if 2 * keys * spec.num_kv_heads * spec.head_size * dtype.itemsize > _MOST_BYTES:
        return False
    pairs = sum(q * k for q, k in zip(common.query_lens, common.context_lens, strict=True))
    seen = pairs if spec.sliding_window is None else min(pairs, spec.sliding_window * sum(common.query_lens))
    return seen * (spec.num_heads // spec.num_kv_heads) >= gather_from * keys
