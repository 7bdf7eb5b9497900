"""Memory into which keys and values are gathered, kept from batch to batch and from layer to layer.

Fresh memory of some megabytes comes from the system page by page, each at its first touch; that can cost several times
the attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention.spec import AttentionSpec


@dataclass(frozen=True)
class Landing:
    """Where some keys and values go; the next piece goes to the same place.

    Attributes:
        raw: (2 * N * K, Hkv * D), as they are in the cache; of an FP8 cache as bytes.
        dense: the same rows in the query's dtype; `raw` itself where that is the cache's dtype.
        key: (N, Hkv, K, D), a view of `dense`.
        value: (N, Hkv, K, D), a view of `dense`.
    """

    raw: torch.Tensor
    dense: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Workspace:
    """Memory for one piece at a time.

    Args:
        spec: the layers.
        dtype: of queries.
        tokens: most keys of a piece.
    """

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, tokens: int) -> None:
        self._shape = (spec.num_kv_heads, spec.head_size)
        width = spec.num_kv_heads * spec.head_size
        self._dense = torch.empty(2 * tokens, width, dtype=dtype)
        fp8 = spec.fp8_cache
        self._raw = torch.empty(2 * tokens, width, dtype=torch.uint8) if fp8 else self._dense

    def land(self, count: int, keys: int) -> Landing:
        """A place for `keys` keys and values of each of `count` sequences."""
        rows = 2 * count * keys
        dense = self._dense[:rows]
        raw = dense if self._raw is self._dense else self._raw[:rows]
        key, value = dense.view(2, count, keys, *self._shape).transpose(2, 3).unbind(0)
        return Landing(raw, dense, key, value)
