"""The paged KV cache: how big it is, how it is laid out, and how tokens get into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.backend import AttentionBackend, KVScales
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
        parts = 1 if self.kind == "mla" else 2
        return self.num_layers * parts * self.num_kv_heads * self.head_size * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        """Keys and values (or the latents) of one block, all layers of the group together."""
        return self.block_size * self.bytes_per_token

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of one block in one layer: (2, block_size, Hkv, D), with MLA (block_size, D)."""
        return self.shape(1)[2:]

    def blocks_that_fit(self, num_bytes: int) -> int:
        """How many blocks `num_bytes` hold, 0 when not even one."""
        return max(0, num_bytes // self.bytes_per_block)

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """(L, num_blocks, 2, block_size, Hkv, D), with MLA (L, num_blocks, block_size, D); a backend's, L times."""
        if self.kind == "mla":
            return (self.num_layers, *latent_cache_shape(num_blocks, self.block_size, self.head_size))
        layer = AttentionBackend.get_kv_cache_shape(num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        return (self.num_layers, *layer)

    def allocate(self, num_blocks: int, device: torch.device | str) -> torch.Tensor:
        """One contiguous tensor of `shape(num_blocks)`; the cache of the group's layer number i is its view `[i]`.

        It is zero: an entry of a block table that stands for no block points at block 0, and kernels may load what
        they mask.

        Raises:
            ValueError: `num_blocks` is not positive.
        """
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least one block, not {num_blocks}")
        return torch.zeros(self.shape(num_blocks), dtype=self.dtype, device=device)


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
    `2 * b * block_size + i`.

    Args:
        slots: int64, any shape, `block * block_size + offset`.
        block_size: tokens in a block.
    """
    return slots + slots.div(block_size, rounding_mode="floor") * block_size


def token_rows(kv_cache: torch.Tensor) -> torch.Tensor:
    """One layer's cache as (num_blocks * 2 * block_size, Hkv * D), a view."""
    num_blocks, two, block_size, num_kv_heads, head_size = kv_cache.shape
    return kv_cache.view(num_blocks * two * block_size, num_kv_heads * head_size)


def store_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: torch.Tensor,
    scales: KVScales = KVScales(),  # noqa: B008 (frozen)
) -> None:
    """Write keys to the given `key_rows` and values beside them.

    Args:
        key: (T, Hkv, D).
        value: (T, Hkv, D).
        kv_cache: one layer's cache, written.
        rows: (2, T) int64, rows of the keys, then of the values.
        scales: of an FP8 cache.
    """
    cache = token_rows(kv_cache)
    if cache.dtype == FP8:  # copied as bytes: indexing knows no FP8
        cache, key, value = (
            cache.view(torch.uint8),
            quantize(key, scales.k).view(torch.uint8),
            quantize(value, scales.v).view(torch.uint8),
        )
    cache.index_copy_(0, rows[0], key.flatten(1))
    cache.index_copy_(0, rows[1], value.flatten(1))


def reshape_and_cache(
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
        kv_cache: one layer's cache, written.
        slot_mapping: (T,) int64, `block * block_size + offset`, all different.
        scales: of an FP8 cache.
    """
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
        slot_mapping: (T,) int64, `block * block_size + offset`, all different.
        scale: of an FP8 cache.
    """
    rows = kv_cache.view(-1, kv_cache.shape[-1])
    latent = torch.cat((kv_c, k_pe), dim=-1)
    if rows.dtype == FP8:  # copied as bytes: indexing knows no FP8
        rows, latent = rows.view(torch.uint8), quantize(latent, scale).view(torch.uint8)
    rows.index_copy_(0, slot_mapping, latent)
