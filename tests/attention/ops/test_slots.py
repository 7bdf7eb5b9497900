"""What a slot means is the same wherever a token is stored: a negative one stores nothing, and only int64 finds all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attention.backend import KVScales
from attention.errors import AttentionInputError
from attention.kv_cache import KVCacheSpec, concat_and_cache_mla, put_rows, reshape_and_cache
from attention.metadata import build_metadata
from attention.ops.dispatch import uses_triton
from attention.ops.paged_attention import PagedAttention
from attention.platform import Platform
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import unsupported_reasons
from attention.spec import FP8, AttentionNeeds, AttentionSpec, MLASpec
from workers.ops.cache_write import CacheWrite
from workers.ops.qk_norm_rope import cos_sin_table, qk_norm_rope_, qk_norm_rope_torch_
from workers.ops.rope_config import RopeConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEC = AttentionSpec(4, 2, 64, 0.125)
LATENT = MLASpec(32, 16, 16, 24)
MLA = AttentionSpec(4, 1, 48, 0.125, mla=LATENT)
SLOTS = (35, -1, 0, -7, 17)
Store = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, KVScales], None]


def _triton(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scales: KVScales) -> None:
    from attention.ops.triton import reshape_and_cache as triton_store

    triton_store.reshape_and_cache(key, value, cache, slots, k_scale=scales.k, v_scale=scales.v)


def _rope(rotate: Callable[..., None]) -> Store:
    """Storing while rotating: at position 0 keys stay as they are."""

    def store(
        key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scales: KVScales
    ) -> None:
        qkv = torch.cat((key, key, value), dim=1)
        table = cos_sin_table(RopeConfig(10000.0), key.shape[2], 4, DEVICE)
        positions = torch.zeros(len(key), dtype=torch.int64, device=DEVICE)
        rotate(qkv, 2, 2, positions, table, cache=CacheWrite(cache, slots, scales))

    return store


STORES: dict[str, Store] = {
    "torch": reshape_and_cache,
    "triton": _triton,
    "PagedAttention": PagedAttention.write_to_paged_cache,
    "rope": _rope(qk_norm_rope_),
    "rope in torch": _rope(qk_norm_rope_torch_),
}


def _filled(dtype: torch.dtype) -> torch.Tensor:
    shape = KVCacheSpec((0,), 2, 64, 16, dtype).shape(3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)[0]


def _expected(before: torch.Tensor, after: torch.Tensor, slots: tuple[int, ...]) -> None:
    """Only the blocks' places of these slots have changed."""
    changed = (before.view(torch.uint8) != after.view(torch.uint8)).flatten(3).any(-1)  # (blocks, 2, block size)
    wanted = torch.zeros_like(changed)
    for slot in slots:
        if slot >= 0:
            wanted[slot // 16, :, slot % 16] = True
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize("slots", [SLOTS, (-1,) * 5, (3, 1, 2, 0, 40)], ids=["some", "all", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, FP8])
@pytest.mark.parametrize("name", STORES)
def test_a_negative_slot_stores_nothing(name: str, dtype: torch.dtype, slots: tuple[int, ...]) -> None:
    if name == "triton" and not uses_triton(torch.empty(0, device=DEVICE)):
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    before = _filled(dtype)
    key, value = torch.randn(2, 5, 2, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE).unbind(0)
    after, scales = before.clone(), KVScales(0.5, 2.0) if dtype == FP8 else KVScales()
    STORES[name](key, value, after, torch.tensor(slots, device=DEVICE), scales)
    _expected(before, after, slots)
    kept = [i for i, slot in enumerate(slots) if slot >= 0]
    reference = before.clone()
    for i in kept:
        reshape_and_cache(key[[i]], value[[i]], reference, torch.tensor([slots[i]], device=DEVICE), scales)
    assert torch.equal(after.view(torch.uint8), reference.view(torch.uint8))


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize(
    "slots",
    [
        torch.zeros(5, dtype=torch.int32, device=DEVICE),
        torch.zeros(6, dtype=torch.int64, device=DEVICE),
        torch.zeros(10, dtype=torch.int64, device=DEVICE)[::2],
    ],
)
def test_slots_are_checked_before_anything_is_stored(name: str, slots: torch.Tensor) -> None:
    if name == "triton" and not uses_triton(torch.empty(0, device=DEVICE)):
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    before = _filled(torch.float32)
    key, value = torch.randn(2, 5, 2, 64, device=DEVICE).unbind(0)
    after = before.clone()
    with pytest.raises(ValueError, match=r"needs.* int64 \(5,\)"):
        STORES[name](key, value, after, slots, KVScales())
    assert torch.equal(after, before)


def test_latents_are_stored_by_the_same_rules() -> None:
    before = torch.randn(3, 16, 48)
    latents, keys = torch.randn(5, 32), torch.randn(5, 16)
    after = before.clone()
    concat_and_cache_mla(latents, keys, after, torch.tensor(SLOTS))
    changed = (before != after).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == sorted(slot for slot in SLOTS if slot >= 0)
    assert torch.equal(after.view(-1, 48)[35], torch.cat((latents[0], keys[0])))
    with pytest.raises(AttentionInputError, match=r"slots of int32.* needs contiguous int64 \(5,\)"):
        concat_and_cache_mla(latents, keys, after, torch.tensor(SLOTS, dtype=torch.int32))


@pytest.mark.parametrize("slots", [SLOTS, (-1,) * 5, (3, 1, 2, 0, 7)], ids=["some", "all", "none"])
def test_rows_on_a_device_that_is_not_waited_for(slots: tuple[int, ...]) -> None:
    """The way for other devices, run here on one that pretends to be one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = torch.randn(40, 6, device=device)
    before, values = cache.clone(), torch.randn(5, 6, device=device)
    rows = torch.tensor(slots, device=device)
    put_rows(cache, _Elsewhere(rows) if device == "cpu" else rows, values)
    for row, value in zip(slots, values, strict=True):
        if row >= 0:
            before[row] = value
    assert torch.equal(cache, before)


class _Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is elsewhere."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> _Elsewhere:
        return tensor.as_subclass(cls)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def _runs(name: str) -> bool:
    can = get_backend(name).capabilities
    needs = AttentionNeeds(MLA if can.mla else SPEC, can.dtypes[0], 16)
    return not unsupported_reasons(name, Platform.of(DEVICE), [needs])


RUNNING = [name for name in BACKENDS if _runs(name)]


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("name", RUNNING)
def test_every_backend_skips_the_padding_of_a_batch(name: str, fp8: bool) -> None:
    """A sequence that stores nothing leaves the cache as it is, and the others' outputs as they are."""
    backend = get_backend(name)
    dtype, mla = backend.capabilities.dtypes[0], backend.capabilities.mla
    spec = replace(MLA if mla else SPEC, kv_cache_dtype=FP8 if fp8 else None)
    if backend.refuse(Platform.of(DEVICE), AttentionNeeds(spec, dtype, 16)):
        pytest.skip("refuses it")
    common = build_metadata([1, 20, 1], [33, 20, 5], [[4, 1, 3], [2, 5], [0]], 16, DEVICE)
    padded = replace(common, slot_mapping=common.slot_mapping.clone())
    padded.slot_mapping[-1] = -1
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(backend.get_kv_cache_shape(6, 16, spec.num_kv_heads, spec.head_size), generator=generator)
    cache = cache.to(DEVICE, spec.kv_cache_dtype or dtype)
    width = LATENT.qk_nope_head_dim + LATENT.qk_rope_head_dim if mla else 64
    query = torch.randn(22, 4, width, generator=generator).to(DEVICE, dtype)
    shapes = ((22, 32), (22, 16)) if mla else ((22, 2, 64), (22, 2, 64))
    key, value = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    weight = torch.randn(4 * (16 + 24), 32, generator=generator).to(DEVICE, dtype)
    impl = backend.impl_class(spec, weight) if mla else backend.impl_class(spec)
    builder = backend.builder_class(spec, dtype, 16, DEVICE)
    one, other = cache.clone(), cache.clone()
    expected = impl.forward(query, key, value, one, builder.build(common))[:-1].clone()
    got = impl.forward(query, key, value, other, builder.build(padded))[:-1]
    assert torch.equal(got, expected)
    block = 0  # of the last sequence
    assert not torch.equal(one[block].float(), cache[block].float())
    assert torch.equal(other[block].view(torch.uint8), cache[block].view(torch.uint8))
    assert torch.equal(other[1:].view(torch.uint8), one[1:].view(torch.uint8))
