"""A tensor that is not what its layout says is refused when it is registered, with both numbers."""

from __future__ import annotations

import pytest
import torch

from kv_transfer.errors import LayoutMismatchError
from kv_transfer.identity import KVIdentity
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.region import Region, regions_of
from kv_transfer.transports.local import LocalFabric

FULL = GroupLayout("full", (0, 2), 4, 2, 8, "float32")
LATENT = GroupLayout("mla", (1,), 4, 1, 24, "bfloat16")


def test_regions_have_their_own_number_of_layers_blocks_and_bytes():
    full, latent = torch.zeros(2, 5, 2, 4, 2, 8), torch.zeros(1, 9, 4, 24, dtype=torch.bfloat16)
    assert regions_of([full, latent], KVLayout((FULL, LATENT))) == (
        Region(full.data_ptr(), 2, 5, full[0, 0].nbytes),
        Region(latent.data_ptr(), 1, 9, latent[0, 0].nbytes),
    )


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(3, 5, 2, 4, 2, 8), "the tensor has 3 layers, its layout 2"),
        (torch.zeros(2, 5, 2, 8, 2, 8), "a block of the tensor has 1024 bytes, one of its layout 512"),
        (torch.zeros(2, 5, 4, 2, 8), "a block of the tensor has 256 bytes, one of its layout 512"),
        (torch.zeros(2, 5, 2, 4, 2, 8, dtype=torch.float16), "has 256 bytes, one of its layout 512"),
        (torch.zeros(2, 5, 2, 4, 2, 8, dtype=torch.int32), "the tensor's dtype is int32, its layout's float32"),
        (torch.zeros(2, 5, 2, 2, 4, 8), r"a block of the tensor is \(2, 2, 4, 8\), one of its layout \(2, 4, 2, 8\)"),
        (
            torch.zeros(2, 5, 2, 2, 4, 8).transpose(3, 4),
            r"strides are \(640, 128, 64, 8, 32, 1\), without .*64, 16, 8, 1",
        ),
        (torch.zeros(2, 10, 2, 4, 2, 8)[:, ::2], r"strides are \(1280, 256, .*without gaps they are \(640, 128,"),
        (torch.zeros(2, 0, 2, 4, 2, 8), r"shape is \(2, 0, 2, 4, 2, 8\)"),
    ],
)
def test_a_tensor_that_disagrees_with_its_layout(tensor, reason):
    with pytest.raises(LayoutMismatchError, match=r"cache group 0 \(full\): .*" + reason):
        LocalConnector(LocalFabric()).register_kv_caches("w", [tensor], KVLayout((FULL,)))


def test_a_latent_cache_described_as_keys_and_values():
    """Its blocks have half the bytes; a peer would have been written to beyond them."""
    as_full = GroupLayout("full", (1,), 4, 1, 24, "bfloat16")
    cache = torch.zeros(1, 9, 4, 24, dtype=torch.bfloat16)
    assert (LATENT.block_bytes, as_full.block_bytes) == (192, 384)
    with pytest.raises(LayoutMismatchError, match="has 192 bytes, one of its layout 384"):
        regions_of([cache], KVLayout((as_full,)))


def test_as_many_tensors_as_groups():
    with pytest.raises(LayoutMismatchError, match="1 tensors for 2 cache groups"):
        regions_of([torch.zeros(2, 5, 2, 4, 2, 8)], KVLayout((FULL, LATENT)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("mha", (0,), 4, 1, 8, "float32"), "kind is 'mha'"),
        (("full", (0,), 4, 1, 8, "int4"), "dtype is 'int4'"),
        (("full", (), 4, 1, 8, "float32"), "at least one"),
        (("full", (1, 0), 4, 1, 8, "float32"), "ascending"),
        (("full", (0,), 0, 1, 8, "float32"), "must be positive"),
        (("sliding", (0,), 4, 1, 8, "float32", 0), "must be positive"),
        (("mla", (0,), 4, 2, 8, "float32"), "num_kv_heads must be 1, not 2"),
        (("mla", (0,), 4, 1, 8, "float32", None, "kv,slot,head,element"), "a block of kind 'mla' has slot,element"),
    ],
)
def test_a_layout_that_cannot_be(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        GroupLayout(*arguments)


def test_a_layer_is_in_one_group():
    with pytest.raises(ValueError, match="one cache group"):
        KVLayout((FULL, GroupLayout("mla", (2,), 4, 1, 24, "bfloat16")))
    with pytest.raises(ValueError, match="one cache group"):
        KVLayout(())


def test_differences_name_group_and_field():
    window = GroupLayout("sliding", (1,), 4, 1, 8, "float32", window=16)
    other = GroupLayout("sliding", (1, 3), 4, 1, 8, "float32", window=32)
    with pytest.raises(LayoutMismatchError) as error:
        KVLayout((FULL, window)).check_compatible(KVLayout((FULL, other)), "d")
    assert str(error.value) == (
        "cannot exchange KV cache with d: layers is 1 here and 1,3 there (cache group 1); "
        "window is 16 here and 32 there (cache group 1)"
    )
    with pytest.raises(LayoutMismatchError, match=r"are full\[0,2\]\+sliding\[1\] here and full\[0,2\] there"):
        KVLayout((FULL, window)).check_compatible(KVLayout((FULL,)), "d")


def test_the_group_that_bounds_how_many_tokens_fit():
    narrow, wide = (GroupLayout("sliding", (i,), 4, 1, 8, "float32", window=2 << i) for i in range(2))
    full = GroupLayout("full", (5,), 4, 1, 8, "float32")
    assert KVLayout((narrow, full, wide)).primary is full
    assert KVLayout((narrow, wide)).primary is wide
    assert KVLayout((narrow, full)).bytes_per_token == full.block_bytes / 4
    assert KVLayout((narrow, wide)).bytes_per_token == 2 * narrow.block_bytes / 4


def test_caches_of_unlike_identities_are_never_exchanged():
    mine, theirs = KVIdentity(version="1", weights="aa"), KVIdentity(version="1", weights="bb")
    KVLayout((FULL,), identity=mine).check_compatible(KVLayout((FULL,), identity=mine), "d")
    with pytest.raises(LayoutMismatchError, match=r"with d: weights is aa here and bb there$"):
        KVLayout((FULL,), identity=mine).check_compatible(KVLayout((FULL,), identity=theirs), "d")
    with pytest.raises(LayoutMismatchError, match="weights is aa here and unknown there"):
        KVLayout((FULL,), identity=mine).check_compatible(KVLayout((FULL,)), "d")
