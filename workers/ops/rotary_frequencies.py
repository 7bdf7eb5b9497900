"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of halves or of pairs, of whole heads or parts."""

from __future__ import annotations

import torch

from workers.ops.rope_config import RopeConfig
from workers.ops.rope_frequencies import attention_factor, inverse_frequencies


class Rotary:
    """Rotates query and key heads; the angles of a batch are computed once and shared by all layers.

    Angles and their cosines are float32 whatever the model's dtype: a position of a few thousand does not fit bfloat16.

    Args:
        rope: the kind of rotation.
        head_size: D.
        dtype: of the heads.
        device: where they are.
        max_model_len: tokens of the longest sequence that is served; see `inverse_frequencies`.
    """

    def __init__(
        self,
        rope: RopeConfig,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
    ) -> None:
        frequencies = inverse_frequencies(rope, head_size, max_model_len)
        self._interleaved = rope.interleaved
        each = frequencies.repeat_interleave(2) if rope.interleaved else torch.cat((frequencies, frequencies))
        self._frequencies = each.to(device)
        self._factor = attention_factor(rope)
        self._rotary_dim, self._head_size = each.shape[0], head_size
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of (T,) positions, each (T, 1, rotary dimensions) in the model's dtype.

        Both are multiplied by `attention_factor`. Sines of each pair's first dimension are negated.
        """
        angles = positions.float()[:, None, None] * self._frequencies
        cosines, sines = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cosines.mul_(self._factor)
            sines.mul_(self._factor)
        first = sines[..., ::2] if self._interleaved else sines[..., : self._rotary_dim // 2]
        first.neg_()
        return cosines.to(self._dtype), sines.to(self._dtype)

    def rotate(self, heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(T, H, D) rotated, as a new contiguous tensor. `angles` comes from the method of that name."""
        if self._rotary_dim == self._head_size:
            return self._rotate(heads, angles)
        rotated = self._rotate(heads[..., : self._rotary_dim], angles)
        return torch.cat((rotated, heads[..., self._rotary_dim :]), dim=-1)

    def _rotate(self, heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cosines, sines = angles
        if self._interleaved:
            swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped = heads.roll(self._rotary_dim // 2, -1)
        return (heads * cosines).addcmul_(swapped, sines)
