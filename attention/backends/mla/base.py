"""The interface of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

The cache keeps one latent c and one rotary key of each token. With W_UK and W_UV, a head's parts of `kv_b_proj`, the
key without rotary embedding is W_UK c, and the value W_UV c. Prefill expands the latents to keys and values of every
head and is ordinary attention. Decode absorbs: q·(W_UK c) = (W_UKᵀ q)·c, so the query is taken into the latent's space,
attention runs over the latents as multi-query attention, and W_UV is applied to its result. Both give the same numbers.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from attention.backend import AttentionBackend, AttentionImpl
from attention.errors import AttentionInputError
from attention.kv_cache import latent_cache_shape
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec, MLASpec


class MLAImpl(AttentionImpl):
    """One layer of multi-head latent attention. `forward` takes, in the places of keys and values, latents and keys:

    query: (T, Hq, qk_nope_head_dim + qk_rope_head_dim), the last part rotated.
    key: (T, kv_lora_rank), the normalised latents; None when all are in the cache already.
    value: (T, qk_rope_head_dim), the rotated keys, the same for all heads; None with `key`.
    kv_cache: this layer's cache, (num_blocks, block_size, latent size).
    output: (T, Hq, v_head_dim).

    Args:
        spec: the layer; `num_kv_heads` is 1 and `head_size` the latent size.
        kv_b_proj: (Hq * (qk_nope_head_dim + v_head_dim), kv_lora_rank), heads one after the other, W_UK before W_UV in
            each; may be filled later, in place.

    Raises:
        AttentionInputError: the layer is none of latent attention, or the weight does not fit it.
    """

    def __init__(self, spec: AttentionSpec, kv_b_proj: torch.Tensor) -> None:
        super().__init__(spec)
        if spec.mla is None:
            raise AttentionInputError("a layer without `AttentionSpec.mla` for a backend of latent attention")
        mla = spec.mla
        if spec.num_kv_heads != 1 or spec.head_size != mla.latent_size:
            raise AttentionInputError(
                f"latent attention has 1 key/value head of the latent's {mla.latent_size}, "
                f"not {spec.num_kv_heads} of {spec.head_size}"
            )
        expected = (spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        if kv_b_proj.shape != expected:
            raise AttentionInputError(f"kv_b_proj of shape {tuple(kv_b_proj.shape)}, expected {expected}")
        self.mla: MLASpec = mla
        self.kv_b_proj = kv_b_proj

    @property
    def w_uk(self) -> torch.Tensor:
        """(Hq, qk_nope_head_dim, kv_lora_rank), a view of the weight."""
        return self._heads()[:, : self.mla.qk_nope_head_dim]

    @property
    def w_uv(self) -> torch.Tensor:
        """(Hq, v_head_dim, kv_lora_rank), a view of the weight."""
        return self._heads()[:, self.mla.qk_nope_head_dim :]

    def _heads(self) -> torch.Tensor:
        return self.kv_b_proj.view(self.spec.num_heads, -1, self.mla.kv_lora_rank)

    def checked_cache(
        self,
        query: torch.Tensor,
        kv_c: torch.Tensor | None,
        k_pe: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
    ) -> torch.Tensor:
        """The cache, if tensors fit the layer.

        Raises:
            AttentionInputError: they do not, or there is no cache.
        """
        mla = self.mla
        expected = (self.spec.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if query.shape[1:] != expected:
            raise AttentionInputError(f"queries of {tuple(query.shape[1:])}, expected {expected}")
        if (kv_c is None) != (k_pe is None):
            raise AttentionInputError("latents and rotary keys come together")
        if kv_c is not None and k_pe is not None:
            sizes = (kv_c.shape[-1], k_pe.shape[-1])
            if sizes != (mla.kv_lora_rank, mla.qk_rope_head_dim):
                raise AttentionInputError(
                    f"latents and rotary keys of {sizes}, expected {(mla.kv_lora_rank, mla.qk_rope_head_dim)}"
                )
        if kv_cache is None or kv_cache.ndim != 3 or kv_cache.shape[-1] != mla.latent_size:
            shape = None if kv_cache is None else tuple(kv_cache.shape)
            raise AttentionInputError(f"a cache of shape {shape}, expected (blocks, block size, {mla.latent_size})")
        return kv_cache


def refuse_all_masks(common: CommonAttentionMetadata) -> None:
    """Refuse a batch that brings a mask.

    Raises:
        AttentionInputError: with the masks.
    """
    if common.features:
        raise AttentionInputError(f"latent attention takes no {', '.join(sorted(common.features))}")


class MLABackend(AttentionBackend):
    """A way to compute multi-head latent attention over a paged cache of latents."""

    impl_class: ClassVar[type[MLAImpl]]

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """One layer's cache: (num_blocks, block_size, head_size), the head size being the latent's.

        Raises:
            AttentionInputError: more than one key/value head.
        """
        if num_kv_heads != 1:
            raise AttentionInputError(f"latent attention has 1 key/value head, not {num_kv_heads}")
        return latent_cache_shape(num_blocks, block_size, head_size)
