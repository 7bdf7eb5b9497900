"""A batch that lasts, as one captured in a CUDA graph does: its plan stays good when others are planned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.kv_cache import KVCacheSpec
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.platform import Platform
from attention.selection.reference import reference_attention
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import unsupported_reasons
from attention.spec import AttentionNeeds, AttentionSpec, Phase

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=64, scale=0.125)
SMALL = replace(SPEC, num_heads=2, num_kv_heads=1)
"""For kernels that an interpreter runs."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch_of(length: int, device: str, lasting: bool) -> CommonAttentionMetadata:
    blocks = list(range(-(-length // 16)))
    return replace(build_metadata([length], [length], [blocks], 16, device), lasting=lasting)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if get_backend(name).builder_class.graph_safe_prefill])
def test_other_batches_leave_its_plan_alone(name: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec, dtype = (SPEC, torch.bfloat16) if device == "cuda" else (SMALL, torch.float32)
    needs = AttentionNeeds(spec, dtype, 16, Phase.PREFILL)
    if reasons := unsupported_reasons(name, Platform.of(torch.device(device)), [needs]):
        pytest.skip(reasons[0])
    backend = get_backend(name)
    builder = backend.builder_class(spec, dtype, 16, torch.device(device))
    impl = backend.impl_class(spec)
    cache = KVCacheSpec((0,), spec.num_kv_heads, 64, 16, dtype).allocate(32, device)[0]
    generator = torch.Generator(device).manual_seed(0)

    def check(common: CommonAttentionMetadata) -> None:
        length = common.query_lens[0]
        query, key, value = (
            torch.randn(length, heads, 64, generator=generator, device=device).to(dtype)
            for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        )
        output = impl.forward(query, key, value, cache, plans[id(common)])
        torch.testing.assert_close(output.float(), reference_attention(spec, query, key, value), rtol=2e-2, atol=2e-2)

    kept = [batch_of(length, device, lasting=True) for length in (64, 33)]
    plans = {id(common): builder.build(common) for common in kept}
    passing = batch_of(200, device, lasting=False)
    plans[id(passing)] = builder.build(passing)
    for common in (passing, *kept):
        check(common)
