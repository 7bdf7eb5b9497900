"""The interface of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

The cache keeps one latent c and one rotary key of each token. With W_UK and W_UV, a head's parts of `kv_b_proj`, the
key without rotary embedding is W_UK c, and the value W_UV c. Prefill expands the latents to keys and values of every
head and is ordinary attention. Decode absorbs: q·(W_UK c) = (W_UKᵀ q)·c, so the query is taken into the latent's space,
attention runs over the latents as multi-query attention, and W_UV is applied to its result. Both give the same numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attention.backends.common.batch_split import BatchSplit, DecodePart, PrefillPart, put, split_batch, take
from attention.errors import AttentionBackendError, AttentionInputError
from attention.kv_cache import concat_and_cache_mla, latent_cache_shape
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec, MLASpec


@dataclass(frozen=True)
class MLAMetadata(AttentionMetadata):
    """A batch in its two parts."""

    split: BatchSplit


class MLABuilder(AttentionMetadataBuilder):
    """Splits batches into prefill and decode.

    Raises:
        AttentionInputError: when a batch brings a mask.
    """

    def build(self, common: CommonAttentionMetadata) -> MLAMetadata:
        """See `AttentionMetadataBuilder.build`."""
        if common.features:
            raise AttentionInputError(f"latent attention takes no {', '.join(sorted(common.features))}")
        return MLAMetadata(common, split_batch(common, self.block_size))


class MLAImpl(AttentionImpl):
    """One layer of multi-head latent attention.

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

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new latents in the cache, then attend over the whole sequences.

        Args:
            query: (T, Hq, qk_nope_head_dim + qk_rope_head_dim), the last part rotated.
            key: (T, kv_lora_rank), the normalised latents; None when all are in the cache already.
            value: (T, qk_rope_head_dim), the rotated keys, the same for all heads; None with `key`.
            kv_cache: this layer's cache, (num_blocks, block_size, latent size).
            metadata: what the backend's builder made of the batch.
            output: (T, Hq, v_head_dim), written and returned when given.

        Returns:
            (T, Hq, v_head_dim), of the query's dtype.

        Raises:
            AttentionInputError: tensors that do not fit the layer.
        """
        batch = cast(MLAMetadata, metadata)
        cache = self._checked(query, key, value, kv_cache)
        if key is not None and value is not None:
            concat_and_cache_mla(key, value, cache, batch.common.slot_mapping, self.kv_scales.k)
        if output is None:
            shape = (query.shape[0], self.spec.num_heads, self.mla.v_head_dim)
            output = torch.empty(shape, dtype=query.dtype, device=query.device)
        prefill, decode = batch.split.prefill, batch.split.decode
        if prefill is not None:
            put(output, prefill.tokens, self.forward_prefill(take(query, prefill.tokens), cache, prefill, batch))
        if decode is not None:
            put(output, decode.tokens, self.forward_decode(take(query, decode.tokens), cache, decode, batch))
        return output

    @abstractmethod
    def forward_prefill(
        self, query: torch.Tensor, kv_cache: torch.Tensor, part: PrefillPart, metadata: MLAMetadata
    ) -> torch.Tensor:
        """Sequences that bring several tokens, over keys and values expanded from their latents.

        Args:
            query: (Tp, Hq, qk_nope_head_dim + qk_rope_head_dim), of those sequences.
            kv_cache: this layer's cache, in which their latents lie.
            part: the sequences.
            metadata: the whole batch.

        Returns:
            (Tp, Hq, v_head_dim).
        """

    @abstractmethod
    def forward_decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, part: DecodePart, metadata: MLAMetadata
    ) -> torch.Tensor:
        """Sequences that bring one token, in the latents' space.

        Args:
            query: (B1, Hq, qk_nope_head_dim + qk_rope_head_dim), of those sequences.
            kv_cache: this layer's cache, in which their latents lie.
            part: the sequences.
            metadata: the whole batch.

        Returns:
            (B1, Hq, v_head_dim).
        """

    def _heads(self) -> torch.Tensor:
        return self.kv_b_proj.view(self.spec.num_heads, -1, self.mla.kv_lora_rank)

    def _checked(
        self,
        query: torch.Tensor,
        kv_c: torch.Tensor | None,
        k_pe: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
    ) -> torch.Tensor:
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


class MLABackend(AttentionBackend):
    """A way to compute multi-head latent attention over a paged cache of latents."""

    impl_class: ClassVar[type[MLAImpl]]
    metadata_class: ClassVar[type[MLAMetadata]] = MLAMetadata
    builder_class: ClassVar[type[MLABuilder]] = MLABuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """One layer's cache: (num_blocks, block_size, head_size), the head size being the latent's.

        Raises:
            AttentionInputError: more than one key/value head.
        """
        if num_kv_heads != 1:
            raise AttentionInputError(f"latent attention has 1 key/value head, not {num_kv_heads}")
        return latent_cache_shape(num_blocks, block_size, head_size)


class KernelToComeImpl(MLAImpl):
    """The implementation of a backend whose kernel is not part of this version: it cannot be made."""

    backend: ClassVar[str]

    def __init__(self, spec: AttentionSpec, kv_b_proj: torch.Tensor) -> None:
        super().__init__(spec, kv_b_proj)
        raise self._missing()

    def forward_prefill(
        self, query: torch.Tensor, kv_cache: torch.Tensor, part: PrefillPart, metadata: MLAMetadata
    ) -> torch.Tensor:
        """See `MLAImpl.forward_prefill`; never reached."""
        raise self._missing()

    def forward_decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, part: DecodePart, metadata: MLAMetadata
    ) -> torch.Tensor:
        """See `MLAImpl.forward_decode`; never reached."""
        raise self._missing()

    def _missing(self) -> AttentionBackendError:
        return AttentionBackendError(f"{self.backend}: its kernel is not part of this version of Baton")
