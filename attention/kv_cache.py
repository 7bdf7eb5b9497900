"""The paged KV cache: how big it is, how it is laid out, and how tokens get into it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from attention.backend import AttentionBackend, KVScales
from attention.cache_layout import CacheLayout, layout_of
from attention.errors import AttentionInputError
from attention.fp8 import quantize
from attention.spec import FP8

CACHE_KINDS = ("full", "sliding", "mla")


@dataclass(frozen=True)
class KVCacheSpec:
    """The KV cache of one cache group, without its size: the layers of a model that keep the same form.

    Attributes:
        layers: numbers of these layers in the model, ascending; L of them.
        num_kv_heads: Hkv.
        head_size: D.
        block_size: tokens in a block.
        dtype: of keys and values.
        kind: "full" keeps keys and values of all tokens, "sliding" of a window; with "mla" a token has one latent of
            `head_size` (`MLASpec.latent_size`) in place of keys and values.
        window: of a sliding group, how many tokens a query sees, itself included; None: all.
        backend: whose shape and order in memory it has; None: that of most.

    Raises:
        ValueError: an unknown kind, no layers or not ascending ones, a window that does not go with the kind or is not
            positive, MLA with more than one key/value head.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    kind: str = "full"
    window: int | None = None
    backend: type[AttentionBackend] | None = None

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise ValueError(f"a cache group is one of {', '.join(CACHE_KINDS)}, not {self.kind!r}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the layers of a cache group are ascending numbers, at least one, not {self.layers}")
        if (self.kind == "sliding") != (self.window is not None):
            raise ValueError(f"a window of {self.window} tokens does not go with a cache group of kind {self.kind!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window has at least 1 token, not {self.window}")
        if self.kind == "mla" and self.num_kv_heads != 1:
            raise ValueError(f"a latent is one for all heads: 1 key/value head, not {self.num_kv_heads}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values (or the latent) of one token, all layers of the group together."""
        return self.bytes_per_block // self.block_size

    @property
    def bytes_per_block(self) -> int:
        """Keys and values (or the latents) of one block, all layers of the group together."""
        return self.num_layers * math.prod(self.block_shape) * self.dtype.itemsize

    @cached_property
    def layout(self) -> CacheLayout:
        """Of each layer.

        Raises:
            AttentionBackendError: see `layout_of`.
        """
        return layout_of(self._owner, self.block_size, self.num_kv_heads, self.head_size)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of one block in one layer, as it lies in memory: (2, block_size, Hkv, D), with MLA (block_size, D)."""
        return self.layout.block_shape

    def blocks_that_fit(self, num_bytes: int) -> int:
        """How many blocks `num_bytes` hold, 0 when not even one."""
        return max(0, num_bytes // self.bytes_per_block)

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """(L, num_blocks, 2, block_size, Hkv, D), with MLA (L, num_blocks, block_size, D); a backend's, L times."""
        layer = self._owner.get_kv_cache_shape(num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        return (self.num_layers, *layer)

    def allocate(self, num_blocks: int, device: torch.device | str) -> torch.Tensor:
        """One tensor of `shape(num_blocks)`, one piece of memory in the order of `layout`.

        The cache of the group's layer number i is its view `[i]`. It is zero: an entry of a block table that stands for
        no block points at block 0, and kernels may load what they mask.

        Raises:
            ValueError: `num_blocks` is not positive.
        """
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least one block, not {num_blocks}")
        stored = (self.num_layers, num_blocks, *self.layout.block_shape)
        where = {dim: place for place, dim in enumerate(self.layout.stride_order)}
        indexed = [1 + where[dim] for dim in range(len(where))]
        return torch.zeros(stored, dtype=self.dtype, device=device).permute(0, *indexed)

    @property
    def _owner(self) -> type[AttentionBackend]:
        return self.backend or (_Latents if self.kind == "mla" else AttentionBackend)


def as_stored(kv_cache: torch.Tensor) -> torch.Tensor:
    """A cache of `KVCacheSpec.allocate` with its dimensions as they lie in memory: contiguous, a view."""
    strides = kv_cache.stride()
    stored = kv_cache.permute(sorted(range(kv_cache.ndim), key=lambda dim: -strides[dim]))
    assert stored.is_contiguous()
    return stored


class _Latents(AttentionBackend):
    """The usual cache of latents."""

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """See `latent_cache_shape`."""
        return latent_cache_shape(num_blocks, block_size, head_size)


def layer_places(groups: Sequence[KVCacheSpec]) -> list[tuple[int, int]]:
    """For each layer of a model the cache group that it belongs to, and its index there.

    Raises:
        ValueError: the groups' layers are not 0 to L - 1, each once.
    """
    places = sorted((layer, group, i) for group, spec in enumerate(groups) for i, layer in enumerate(spec.layers))
    if [layer for layer, _, _ in places] != list(range(len(places))):
        raise ValueError(f"each layer is in one cache group: {[spec.layers for spec in groups]}")
    return [(group, i) for _, group, i in places]


def latent_cache_shape(num_blocks: int, block_size: int, latent_size: int) -> tuple[int, int, int]:
    """One layer's cache with multi-head latent attention: (num_blocks, block_size, latent_size)."""
    return (num_blocks, block_size, latent_size)


def key_rows(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where the keys of `slots` lie in a layer's cache seen as rows of one token each; values lie `block_size` later.

    A block is `block_size` rows of keys and then as many of values, so slot `b * block_size + i` has its key in row
    `2 * b * block_size + i`. Negative slots, which are nobody's, have negative rows.

    Args:
        slots: int64, any shape, `block * block_size + offset`.
        block_size: tokens in a block.
    """
    return slots + slots.div(block_size, rounding_mode="floor") * block_size


def token_rows(kv_cache: torch.Tensor) -> torch.Tensor:
    """One layer's cache as (num_blocks * 2 * block_size, Hkv * D), a view."""
    num_blocks, two, block_size, num_kv_heads, head_size = kv_cache.shape
    return kv_cache.view(num_blocks * two * block_size, num_kv_heads * head_size)


def check_slots(slot_mapping: torch.Tensor, num_tokens: int) -> None:
    """Refuse slots that do not fit the tokens, or that are too narrow to find them in a large cache.

    Raises:
        AttentionInputError: anything but contiguous int64, one for each token.
    """
    shape = tuple(slot_mapping.shape)
    if slot_mapping.dtype != torch.int64 or shape != (num_tokens,) or not slot_mapping.is_contiguous():
        raise AttentionInputError(
            f"slots of {str(slot_mapping.dtype).removeprefix('torch.')} {shape} with strides {slot_mapping.stride()}: "
            f"needs contiguous int64 ({num_tokens},)"
        )


def put_rows(cache: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Copy each of `values` to its row of a cache; a negative row skips its value. Waits for no device.

    Args:
        cache: (N, W), written.
        rows: (T,) int64, those that are not negative all different.
        values: (T, W), of the cache's dtype.
    """
    if rows.shape[0] == 0:
        return
    skipped = rows < 0
    if rows.device.type == "cpu":
        if skipped.any():
            rows, values = rows[~skipped], values[~skipped]
        cache.index_copy_(0, rows, values)
        return
    # What is skipped repeats the first that is not, or the cache's own first row where there is none.
    first = skipped.to(torch.int8).argmin(0, keepdim=True)
    row = rows.index_select(0, first)
    value = torch.where(row[:, None] < 0, cache[:1], values.index_select(0, first))
    cache.index_copy_(0, torch.where(skipped, row.clamp(min=0), rows), torch.where(skipped[:, None], value, values))


def context_slots(
    block_tables: torch.Tensor, rows: Sequence[int], begins: Sequence[int], lens: Sequence[int], block_size: int
) -> torch.Tensor:
    """Slots of some tokens of some sequences, piece after piece: (sum of lens,) int64, found on the device.

    Args:
        block_tables: (B, max_blocks) int32.
        rows: of each piece, the sequence's row in the block tables.
        begins: positions of their first tokens.
        lens: how many tokens each has.
        block_size: tokens in a block.
    """
    device, total = block_tables.device, sum(lens)
    of_pieces = torch.tensor([list(rows), list(begins), list(lens)], dtype=torch.int64).to(device)
    ends = of_pieces[2].cumsum(0)
    owners = torch.repeat_interleave(torch.arange(len(lens), device=device), of_pieces[2], output_size=total)
    first = of_pieces[1] + of_pieces[2] - ends
    positions = torch.arange(total, device=device) + first[owners]
    blocks = block_tables[of_pieces[0][owners], positions // block_size].long()
    return blocks * block_size + positions % block_size


def take_rows(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copies of rows of a cache, of its dtype.

    Args:
        cache: (rows, n), one layer's, see `token_rows`.
        rows: (N,) int64, none of them negative.
    """
    if cache.dtype.itemsize == 1:  # copied as bytes: indexing knows no FP8
        return cache.view(torch.uint8).index_select(0, rows).view(cache.dtype)
    return cache.index_select(0, rows)


def store_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: torch.Tensor,
    scales: KVScales = KVScales(),  # noqa: B008 (frozen)
    may_skip: bool = True,
) -> None:
    """Write keys to the given `key_rows` and values beside them; a negative row skips its token.

    Args:
        key: (T, Hkv, D).
        value: (T, Hkv, D).
        kv_cache: one layer's cache, written.
        rows: (2, T) int64, rows of the keys, then of the values.
        scales: of an FP8 cache.
        may_skip: whether a row may be negative; where it is known that none is, nobody looks.
    """
    cache = token_rows(kv_cache)
    if cache.dtype == FP8:  # copied as bytes: indexing knows no FP8
        cache, key, value = (
            cache.view(torch.uint8),
            quantize(key, scales.k).view(torch.uint8),
            quantize(value, scales.v).view(torch.uint8),
        )
    for half, tokens in zip(rows, (key, value), strict=True):
        if may_skip:
            put_rows(cache, half, tokens.flatten(1))
        else:
            cache.index_copy_(0, half, tokens.flatten(1))


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: KVScales = KVScales(),  # noqa: B008 (frozen)
) -> None:
    """Write each token's key and value into its slot; the twin of the Triton kernel, for any device.

    Args:
        key: (T, Hkv, D).
        value: (T, Hkv, D).
        kv_cache: one layer's cache, written.
        slot_mapping: (T,) int64, `block * block_size + offset`, all different; a negative one skips its token.
        scales: of an FP8 cache.

    Raises:
        AttentionInputError: slots of another dtype or shape.
    """
    check_slots(slot_mapping, key.shape[0])
    block_size = kv_cache.shape[2]
    keys = key_rows(slot_mapping, block_size)
    store_rows(key, value, kv_cache, torch.stack((keys, keys + block_size)), scales)


def concat_and_cache_mla(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, scale: float = 1.0
) -> None:
    """Write each token's latent and rotary key, one after the other, into its slot.

    Args:
        kv_c: (T, kv_lora_rank), normalised.
        k_pe: (T, qk_rope_head_dim), rotated.
        kv_cache: one layer's cache, (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), written.
        slot_mapping: (T,) int64, `block * block_size + offset`, all different; a negative one skips its token.
        scale: of an FP8 cache.

    Raises:
        AttentionInputError: slots of another dtype or shape.
    """
    check_slots(slot_mapping, kv_c.shape[0])
    rows = kv_cache.view(-1, kv_cache.shape[-1])
    latent = torch.cat((kv_c, k_pe), dim=-1)
    if rows.dtype == FP8:  # copied as bytes: indexing knows no FP8
        rows, latent = rows.view(torch.uint8), quantize(latent, scale).view(torch.uint8)
    put_rows(rows, slot_mapping, latent)
