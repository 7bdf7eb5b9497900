"""How a worker keeps its KV cache, described so that two workers can compare."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from kv_transfer.errors import LayoutMismatchError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class KVLayout:
    """The layout of one worker's KV cache.

    Attributes:
        kind: "mha" (keys and values per head; GQA and MQA too) or "mla" (one latent per token).
        num_layers: layers that have a cache.
        block_size: tokens in a block.
        num_kv_heads: heads that this rank keeps.
        head_size: elements of one head's key, and of its value.
        dtype: element type, a key of `DTYPE_BYTES`.
        order: dimensions of one layer's block, outermost first.
        tp_size: tensor-parallel ranks that share the heads.
        block_shape: their sizes; None: those that follow from the others.
    """

    kind: str
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str
    order: str = "kv,slot,head,element"
    tp_size: int = 1
    block_shape: tuple[int, ...] | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        if self.block_shape is not None:
            return math.prod(self.block_shape) * DTYPE_BYTES[self.dtype]
        parts = 1 if self.kind == "mla" else 2
        return parts * self.block_size * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]

    def differences(self, other: KVLayout) -> list[str]:
        """Each field in which the two differ, in words."""
        return [
            f"{field.name} is {getattr(self, field.name)} here and {getattr(other, field.name)} there"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    def check_compatible(self, other: KVLayout, peer: str) -> None:
        """Refuse a peer whose blocks cannot be copied as they are.

        Raises:
            LayoutMismatchError: naming the peer and every difference.
        """
        if differences := self.differences(other):
            raise LayoutMismatchError(f"cannot exchange KV cache with {peer}: " + "; ".join(differences))
