"""How a worker keeps its KV cache, described so that two workers can compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.errors import LayoutMismatchError
from kv_transfer.identity import UNKNOWN, KVIdentity

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_KV_ORDER, _LATENT_ORDER = "kv,slot,head,element", "slot,element"
_ORDERS = {"full": _KV_ORDER, "sliding": _KV_ORDER, "mla": _LATENT_ORDER}


@dataclass(frozen=True)
class GroupLayout:
    """The layers of a model that keep the same form: a cache group, which has a region and blocks of its own.

    Attributes:
        kind: "full" (keys and values per head, of all tokens; GQA and MQA too), "sliding" (of a window of tokens) or
            "mla" (one latent per token).
        layers: numbers of the model's layers, ascending; index j of the group is layer `layers[j]`.
        block_size: tokens in a block.
        num_kv_heads: heads that this rank keeps; 1 for "mla".
        head_size: elements of one head's key, and of its value; of the latent for "mla".
        dtype: element type, a key of `DTYPE_BYTES`.
        window: tokens that a query sees, itself included; None: all.
        order: dimensions of one layer's block, outermost first, out of kv, slot, head and element; empty: the kind's.
        shape: their sizes, where a backend has dimensions of its own among them; empty: those that follow.
        copies: ranks, neighbours, that keep the same here: all of them a latent, some a head where there are more ranks
            than heads. Each hands over its share of the layers, see `KVLayout.share`.

    Raises:
        ValueError: an unknown kind, dtype or dimension, no layers, or sizes that are not positive.
    """

    kind: str
    layers: tuple[int, ...]
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str
    window: int | None = None
    order: str = ""
    shape: tuple[int, ...] = ()
    copies: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _ORDERS:
            raise ValueError(f"kind is {self.kind!r}, it must be one of {', '.join(_ORDERS)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}, it must be one of {', '.join(DTYPE_BYTES)}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers are {self.layers}, they must be ascending, and at least one")
        sizes = (self.block_size, self.num_kv_heads, self.head_size, 1 if self.window is None else self.window)
        if min(*sizes, self.copies) < 1:
            raise ValueError(f"block_size, num_kv_heads, head_size, window and copies must be positive: {self}")
        if self.kind == "mla" and self.num_kv_heads != 1:
            raise ValueError(f"a latent is one for all heads: num_kv_heads must be 1, not {self.num_kv_heads}")
        object.__setattr__(self, "order", self.order or _ORDERS[self.kind])
        dimensions = self.order.split(",")
        if self.shape and (len(self.shape) != len(dimensions) or min(self.shape) < 1):
            raise ValueError(f"shape is {self.shape}, order {self.order!r}")
        if not self.shape and sorted(dimensions) != sorted(_ORDERS[self.kind].split(",")):
            raise ValueError(f"order is {self.order!r}, a block of kind {self.kind!r} has {_ORDERS[self.kind]}")

    @property
    def num_layers(self) -> int:
        """Layers of the group."""
        return len(self.layers)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of one block in one layer: its dimensions in `order`. A latent has no "kv", and so no factor 2."""
        if self.shape:
            return self.shape
        sizes = {"kv": 2, "slot": self.block_size, "head": self.num_kv_heads, "element": self.head_size}
        return tuple(sizes[dimension] for dimension in self.order.split(","))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return math.prod(self.block_shape) * DTYPE_BYTES[self.dtype]

    def differences(self, other: GroupLayout) -> list[str]:
        """Each field in which the two differ, in words."""
        return [
            f"{field.name} is {_shown(getattr(self, field.name))} here and {_shown(getattr(other, field.name))} there"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True)
class KVLayout:
    """The layout of one worker's KV cache.

    Attributes:
        groups: in the model's order; a group's index stands for it in every message.
        tp_size: tensor-parallel ranks that share the heads.
        identity: whose keys and values they are.
        tp_rank: which of these ranks keeps it; workers exchange KV cache rank by rank.

    Raises:
        ValueError: no groups, a layer in two of them, a rank that is none, or copies that do not divide the ranks.
    """

    groups: tuple[GroupLayout, ...]
    tp_size: int = 1
    identity: KVIdentity = UNKNOWN
    tp_rank: int = 0

    def __post_init__(self) -> None:
        layers = [layer for group in self.groups for layer in group.layers]
        if not layers or len(layers) != len(set(layers)):
            raise ValueError(f"each layer must be in one cache group: {[group.layers for group in self.groups]}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"rank {self.tp_rank} of {self.tp_size} ranks: must be 0 to {self.tp_size - 1}")
        if odd := [group.copies for group in self.groups if self.tp_size % group.copies]:
            raise ValueError(f"{odd[0]} ranks that keep the same do not divide {self.tp_size} ranks")

    def share(self, group: int) -> range:
        """The layers of a cache group that this rank hands over and is sent, as places within the group.

        All, unless other ranks keep the same: then these take turns by layer, so that each sends at a part of the pace
        throughout a prompt, and blocks that lie together travel as one as ever.
        """
        layout = self.groups[group]
        return range(self.tp_rank % layout.copies, layout.num_layers, layout.copies)

    @property
    def num_layers(self) -> int:
        """Layers of the model that have a cache."""
        return sum(group.num_layers for group in self.groups)

    @property
    def bytes_per_token(self) -> float:
        """What a token more of a long prompt adds to a rank's part of a handoff, as the mean of all ranks.

        Counted in the groups that keep all tokens, or in all if none does.
        """
        growing = [group for group in self.groups if group.window is None] or self.groups
        return sum(group.num_layers * group.block_bytes / (group.block_size * group.copies) for group in growing)

    @property
    def primary_index(self) -> int:
        """The index of the group that bounds how many tokens fit, see `primary_group`."""
        return primary_group([group.window for group in self.groups])

    @property
    def primary(self) -> GroupLayout:
        """See `primary_index`."""
        return self.groups[self.primary_index]

    def differences(self, other: KVLayout) -> list[str]:
        """Each part of the identity, cache group and field in which the two differ, in words."""
        found = self.identity.differences(other.identity)
        if self.tp_size != other.tp_size:
            found.append(f"tp_size is {self.tp_size} here and {other.tp_size} there")
        elif self.tp_rank != other.tp_rank:
            found.append(f"tp_rank is {self.tp_rank} here and {other.tp_rank} there")
        if len(self.groups) != len(other.groups):
            return [*found, f"cache groups are {_kinds(self)} here and {_kinds(other)} there"]
        for index, (own, theirs) in enumerate(zip(self.groups, other.groups, strict=True)):
            found += [f"{difference} (cache group {index})" for difference in own.differences(theirs)]
        return found

    def check_compatible(self, other: KVLayout, peer: str) -> None:
        """Refuse a peer to and from which nothing can be transferred.

        Raises:
            LayoutMismatchError: naming the peer and every difference.
        """
        plan = TransferPlan(self, other)
        if plan.unsupported_reasons:
            raise LayoutMismatchError(f"cannot exchange KV cache with {peer}: " + "; ".join(plan.unsupported_reasons))


def primary_group(windows: Sequence[int | None]) -> int:
    """Which of the groups of these windows bounds how many tokens fit: the first that keeps all, else the widest."""
    widths = [math.inf if window is None else window for window in windows]
    return widths.index(max(widths))


class TransferPlan:
    """How what is kept in one layout gets into another: today as it is, block by block, group by group.

    Two layouts that differ have no plan. Splitting or merging blocks, taking a share of the heads and converting
    elements would each be a plan that has no reason against it.

    Attributes:
        source: of the worker that writes.
        destination: of the worker that is written to.
        unsupported_reasons: why it cannot be done; empty: it can.
    """

    def __init__(self, source: KVLayout, destination: KVLayout) -> None:
        self.source = source
        self.destination = destination
        self.unsupported_reasons = tuple(source.differences(destination))


def _shown(value: object) -> str:
    """A field's value; layers as ranges."""
    if not isinstance(value, tuple):
        return str(value)
    ranges: list[list[int]] = []
    for layer in value:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def _kinds(layout: KVLayout) -> str:
    return "+".join(f"{group.kind}[{_shown(group.layers)}]" for group in layout.groups)
