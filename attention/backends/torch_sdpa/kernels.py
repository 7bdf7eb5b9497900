"""Attention over one tile: through PyTorch's operators, or with the scores written out in float32.

Query heads that share a key/value head are never given copies of it: in a sequence of queries they are a stride of
zero, with one query for each sequence they are the query rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from attention.backends.torch_sdpa.tiles import Tile
from attention.ops.torch_attention import Scores, attend

State = tuple[torch.Tensor, torch.Tensor | None]
"""What attention over some keys gives: (N, Hq, D), and the logarithms of the denominators, (N, Hq) float32, which tell
how it merges with attention over other keys; None: it cannot be merged."""


class Kernel(Protocol):
    """A way to attend over one tile."""

    def one_each(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile) -> State:
        """N sequences of one query: (N, Hq, D) over keys and values (N, Hkv, K, D)."""

    def sequence(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile) -> State:
        """One sequence of n queries: (n, Hq, D) over keys and values (K, Hkv, D)."""


class DotProduct:
    """`scaled_dot_product_attention`, on any device. It gives no denominators.

    Args:
        scale: multiplies q·k.
    """

    __slots__ = ("_scale",)

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def one_each(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile) -> State:
        """See `Kernel`."""
        count, num_heads, size = query.shape
        heads = key.shape[1]
        q = query.reshape(count, heads, num_heads // heads, size)
        if heads == num_heads and q.dtype == torch.bfloat16 and not q.is_cuda:
            # On the CPU the operator takes a path several times slower for a single bfloat16 row: it gets it twice.
            out, lse = self._attend(q.expand(-1, -1, 2, -1), key, value, tile)
            return out[:, :, 0], None if lse is None else lse[:, :, 0]
        out, lse = self._attend(q, key, value, tile)
        return out.reshape(count, num_heads, size), None if lse is None else lse.flatten(1)

    def sequence(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile) -> State:
        """See `Kernel`."""
        heads = key.shape[1]
        group = query.shape[1] // heads
        q = query.unflatten(1, (heads, group)).permute(1, 2, 0, 3)
        k = key.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        v = value.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        out, lse = self._attend(q, k, v, tile)
        return out.permute(2, 0, 1, 3).flatten(1, 2), None if lse is None else lse.permute(2, 0, 1).flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile) -> State:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=tile.mask, is_causal=tile.causal, scale=self._scale
        ), None


class MergeableDotProduct(DotProduct):
    """The operator behind `scaled_dot_product_attention` on the CPU, which also gives the denominators."""

    __slots__ = ()

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile) -> State:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, tile.causal, attn_mask=tile.mask, scale=self._scale
        )
        return out, lse


class WrittenOut:
    """Scores in float32, with all that can be done to them.

    Args:
        by_rule: how keys are scored where a tile has no mask.
        by_mask: the same where it has one.
    """

    __slots__ = ("_by_mask", "_by_rule")

    def __init__(self, by_rule: Scores, by_mask: Scores) -> None:
        self._by_rule = by_rule
        self._by_mask = by_mask

    def one_each(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile) -> State:
        """See `Kernel`."""
        out, lse = self._attend(query[:, None], key.transpose(1, 2), value.transpose(1, 2), tile)
        return out[:, 0], lse[:, 0]

    def sequence(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile) -> State:
        """See `Kernel`."""
        out, lse = self._attend(query[None], key[None], value[None], tile)
        return out[0], lse[0]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query_pos = torch.arange(tile.behind, tile.behind + query.shape[1], device=query.device)
        key_pos = torch.arange(key.shape[1], device=query.device)
        scores = self._by_rule if tile.mask is None else self._by_mask
        return attend(query, key, value, query_pos[None], key_pos[None], scores, tile.mask)
