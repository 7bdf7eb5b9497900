"""What is fused in front of latent attention: the Triton kernel against its twin in plain torch."""

from __future__ import annotations

import pytest
import torch

from attention.backend import KVScales
from attention.spec import FP8
from workers.ops.cache_write import CacheWrite
from workers.ops.latent_norm_rope import latent_norm_rope_, latent_norm_rope_torch_
from workers.ops.qk_norm_rope import cos_sin_table
from workers.ops.rope_config import RopeConfig

launch = pytest.importorskip("workers.ops.triton.latent_norm_rope").launch_latent_norm_rope
TOKENS, HEADS, NOPE, RANK, ROTARY = 5, 3, 12, 24, 8


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(TOKENS, HEADS * (NOPE + ROTARY) + RANK + ROTARY, generator=generator)
    weight = torch.rand(RANK, generator=generator)
    positions = torch.randint(0, 50, (TOKENS,), generator=generator)
    return wide, weight, positions, torch.tensor([7, -1, 0, 30, 12])


def parts(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = HEADS * (NOPE + ROTARY)
    return wide[:, :size].unflatten(1, (HEADS, NOPE + ROTARY)), wide[:, size:]


@pytest.mark.parametrize("dtype", [None, torch.float32, FP8], ids=["no cache", "float32", "fp8"])
@pytest.mark.parametrize("turned", ["halves", "pairs", "in part", "not"])
def test_one_kernel_does_what_the_operations_do(turned: str, dtype: torch.dtype | None) -> None:
    wide, weight, positions, slots = inputs()
    rope = RopeConfig(1e4, partial_rotary_factor=0.5 if turned == "in part" else 1.0)
    table = None if turned == "not" else cos_sin_table(rope, ROTARY, 50, torch.device("cpu"))
    results = []
    for op in (launch, latent_norm_rope_torch_):
        own, write = wide.clone(), None
        if dtype is not None:
            cache = torch.full((8, 4, RANK + ROTARY), 7.0).to(dtype)
            write = CacheWrite(cache, slots, KVScales(0.5) if dtype is FP8 else KVScales())
        op(*parts(own), positions, table, weight, 1e-6, write, turned == "pairs")
        results.append((own, None if write is None else write.kv_cache.float()))
    (ours, stored), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(parts(ours)[0][..., :NOPE], parts(wide)[0][..., :NOPE])
    if stored is not None and expected is not None:
        if dtype is FP8:  # the interpreter loses the carry where rounding to FP8 reaches the next power of two
            assert torch.isclose(stored, expected, rtol=0.13, atol=2.0**-9).float().mean() > 0.97
        else:
            torch.testing.assert_close(stored, expected)
        untouched = sorted(set(range(32)) - set(slots.tolist()))
        assert (stored.view(32, -1)[untouched] == 7.0).all()


def test_what_does_not_fit_is_refused() -> None:
    wide, weight, positions, slots = inputs()
    query, latent = parts(wide)
    with pytest.raises(ValueError, match="queries of"):
        latent_norm_rope_(query[:3], latent, positions, None, weight, 1e-6)
    with pytest.raises(ValueError, match="positions of"):
        latent_norm_rope_(query, latent, positions[:3], None, weight, 1e-6)
    with pytest.raises(ValueError, match="a cache of"):
        latent_norm_rope_(query, latent, positions, None, weight, 1e-6, CacheWrite(torch.zeros(2, 4, 8), slots))
