"""A backend's own cache: its shape and its order in memory are asked wherever memory is allocated."""

from __future__ import annotations

import math

import pytest
import torch

from attention.backend import AttentionBackend
from attention.backends.common.per_phase import backend_by_phase
from attention.backends.mla.cpu_mla import CpuMLABackend
from attention.backends.torch_sdpa.cpu_attn import CpuAttnBackend
from attention.cache_layout import layout_of
from attention.errors import AttentionBackendError
from attention.kv_cache import KVCacheSpec, as_stored
from attention.selection.registry import BACKENDS, get_backend
from attention.spec import AttentionNeeds, AttentionSpec
from odd_caches import HeadsFirstBackend, HeadsOutsideBackend

SPEC = AttentionSpec(4, 2, 16, 0.25)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backends_layout_is_what_memory_is_allocated_as(name: str) -> None:
    backend = get_backend(name)
    mla, heads = backend.capabilities.mla, 1 if backend.capabilities.mla else 2
    layout = layout_of(backend, 32, heads, 64)
    cache = KVCacheSpec(
        (0, 1, 2), heads, 64, 32, torch.bfloat16, kind="mla" if mla else "full", backend=backend
    ).allocate(5, "cpu")
    assert cache.shape == (3, *backend.get_kv_cache_shape(5, 32, heads, 64))
    assert as_stored(cache).shape == (3, 5, *layout.block_shape)
    assert layout.dims == (("slot", "element") if mla else ("kv", "slot", "head", "element"))
    assert backend.accepts_stored_keys(), "what the fused kernels write is what it reads"


@pytest.mark.parametrize(
    ("backend", "shape", "stored"),
    [
        (HeadsFirstBackend, (3, 5, 2, 4, 32, 16), (3, 5, 2, 4, 32, 16)),
        (HeadsOutsideBackend, (3, 5, 2, 32, 4, 16), (3, 5, 2, 4, 32, 16)),
        (backend_by_phase(HeadsOutsideBackend, HeadsOutsideBackend, []), (3, 5, 2, 32, 4, 16), (3, 5, 2, 4, 32, 16)),
    ],
)
def test_an_override_is_followed(
    backend: type[AttentionBackend], shape: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    spec = KVCacheSpec((0, 1, 2), 4, 16, 32, torch.float32, backend=backend)
    cache = spec.allocate(5, "cpu")
    assert cache.shape == spec.shape(5) == shape
    memory = as_stored(cache)
    assert memory.shape == stored
    assert memory.is_contiguous()
    assert memory.data_ptr() == cache.data_ptr()
    assert spec.layout.dims == ("kv", "head", "slot", "element")
    assert not backend.accepts_stored_keys()


def test_bytes_are_those_of_the_backends_shape() -> None:
    class Padded(CpuAttnBackend):
        """Heads padded to 128 elements."""

        @staticmethod
        def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
            return (num_blocks, 2, block_size, num_kv_heads, -(-head_size // 128) * 128)

    spec = KVCacheSpec((0, 1, 2), 4, 16, 32, torch.float32, backend=Padded)
    assert spec.bytes_per_block == 3 * 2 * 32 * 4 * 128 * 4 == spec.allocate(1, "cpu").nbytes
    assert spec.bytes_per_token * 32 == spec.bytes_per_block
    assert spec.blocks_that_fit(10 * spec.bytes_per_block) == 10
    assert spec.layout.dims == ("kv", "slot", "head", "256"), "no dimension that is known"


def test_latents_have_a_layout_without_their_backend() -> None:
    alone, owned = (
        KVCacheSpec((0, 1), 1, 576, 64, torch.float32, kind="mla", backend=b) for b in (None, CpuMLABackend)
    )
    assert alone.layout == owned.layout
    assert math.prod(alone.layout.block_shape) == 64 * 576


@pytest.mark.parametrize(
    ("shape", "order", "message"),
    [
        ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), "as kv, block, slot, head, element of the dimensions block, kv"),
        ((1, 0, 2, 3, 4), (0, 1, 2, 3, 4), "blocks must come first in both"),
        ((1, 0, 2, 3, 4), (1, 0, 2, 3, 4), "blocks must come first in both"),
        ((0, 1, 2, 3, 4), (0, 1, 2, 3), r"in the order \(0, 1, 2, 3\)"),
        ((0, 1, 2, 3, 4), (0, 1, 1, 3, 4), r"in the order \(0, 1, 1, 3, 4\)"),
    ],
)
def test_a_block_must_be_one_piece_of_memory(shape: tuple[int, ...], order: tuple[int, ...], message: str) -> None:
    class Odd(CpuAttnBackend):
        name = "ODD"

        @staticmethod
        def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
            sizes = (num_blocks, 2, block_size, num_kv_heads, head_size)
            return tuple(sizes[dim] for dim in shape)

        @staticmethod
        def get_kv_cache_stride_order() -> tuple[int, ...]:
            return order

    with pytest.raises(AttentionBackendError, match=f"ODD lays out.*{message}"):
        KVCacheSpec((0, 1, 2), 4, 16, 32, torch.float32, backend=Odd).allocate(5, "cpu")


def test_the_two_phases_of_a_layer_share_a_cache_and_must_agree() -> None:
    with pytest.raises(AttentionBackendError, match=r"CPU_ATTN for prefill and HEADS_OUTSIDE for decode cannot share"):
        backend_by_phase(CpuAttnBackend, HeadsOutsideBackend, [AttentionNeeds(SPEC, torch.float32, 16)])
    # Equal in every size: what the dimensions are still tells them apart.
    square = AttentionSpec(16, 16, 16, 0.25)
    with pytest.raises(AttentionBackendError, match=r"cannot share"):
        backend_by_phase(CpuAttnBackend, HeadsFirstBackend, [AttentionNeeds(square, torch.float32, 16)])
