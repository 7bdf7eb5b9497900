"""Backends whose libraries bring a decode kernel of latent attention alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attention.backends.mla.expanding import Expanded, ExpandingImpl
from attention.errors import AttentionInputError


class DecodingImpl(ExpandingImpl):
    """One layer's decode steps; prompts are for another backend, see `attention.backends.common.per_phase`."""

    backend: ClassVar[str]

    def attend(
        self, query: torch.Tensor, keys: Expanded, call: Any, output: torch.Tensor, wants_lse: bool
    ) -> torch.Tensor | None:
        """Refuse.

        Raises:
            AttentionInputError: always.
        """
        raise AttentionInputError(f"{self.backend} is made for decode, and the batch brings prompts")

    def query_room(self, rotary_query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Absorbed and rotary queries as views of one tensor, the rotary ones copied to it: `joined` is that."""
        rank = self.mla.kv_lora_rank
        room = rotary_query.new_empty(*rotary_query.shape[:2], self.mla.latent_size)
        room[..., rank:] = rotary_query
        return room[..., :rank], room[..., rank:]

    def joined(self, query: torch.Tensor) -> torch.Tensor:
        """(B, Hq, R + P), contiguous: the whole of which `query`, of `query_room`, is the first part."""
        size = self.mla.latent_size
        batch, heads = query.shape[:2]
        return query.as_strided((batch, heads, size), (heads * size, size, 1))
