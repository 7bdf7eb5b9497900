"""Two backends in one model: each batch runs as the backend of its phase would run it."""

from __future__ import annotations

import pytest
import torch

from attention.backend import KVScales
from attention.backends.common.per_phase import backend_by_phase, phase_of
from attention.backends.torch_sdpa.backend import TorchSdpaBackend
from attention.backends.torch_sdpa.cpu_attn import CpuAttnBackend
from attention.errors import AttentionBackendError
from attention.kv_cache import KVCacheSpec
from attention.metadata import build_metadata
from attention.platform import DeviceKind, Platform
from attention.spec import FP8, AttentionNeeds, AttentionSpec, Phase

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)
NEEDS = AttentionNeeds(SPEC, torch.float32, 16)
BATCHES = {Phase.PREFILL: ((5, 20), (1, 9), (33, 33)), Phase.DECODE: ((1, 20), (1, 1), (1, 40))}


def outcome(backend, phase: Phase, spec: AttentionSpec = SPEC, scales: KVScales | None = None):
    """What a batch gives with a backend, and the cache behind it."""
    generator = torch.Generator().manual_seed(1)
    lens = BATCHES[phase]
    tables = [list(range(3 * i, 3 * i + 3)) for i in range(len(lens))]
    common = build_metadata([q for q, _ in lens], [k for _, k in lens], tables, 16)
    shape = KVCacheSpec((0,), 2, 16, 16, spec.kv_cache_dtype or torch.float32).shape(9)
    cache = torch.randn(shape, generator=generator).to(spec.kv_cache_dtype or torch.float32)[0]
    num_tokens = sum(common.query_lens)
    query = torch.randn(num_tokens, 4, 16, generator=generator)
    key, value = (torch.randn(num_tokens, 2, 16, generator=generator) for _ in range(2))
    builder = backend.builder_class(spec, torch.float32, 16, torch.device("cpu"))
    impl = backend.impl_class(spec)
    impl.kv_scales = scales or KVScales()
    return impl.forward(query, key, value, cache, builder.build(common)), cache


@pytest.mark.parametrize("phase", BATCHES)
def test_a_batch_runs_as_the_backend_of_its_phase_runs_it(phase):
    both = backend_by_phase(TorchSdpaBackend, CpuAttnBackend, [NEEDS])
    own = {Phase.PREFILL: TorchSdpaBackend, Phase.DECODE: CpuAttnBackend}[phase]
    for got, expected in zip(outcome(both, phase), outcome(own, phase), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("phase", BATCHES)
def test_an_fp8_cache_has_the_same_scales_in_both(phase):
    spec = AttentionSpec(4, 2, 16, 0.25, kv_cache_dtype=FP8)
    both = backend_by_phase(CpuAttnBackend, CpuAttnBackend, [NEEDS])
    scales = KVScales(0.5, 0.25)
    got, _ = outcome(both, phase, spec, scales)
    expected, _ = outcome(CpuAttnBackend, phase, spec, scales)
    assert torch.equal(got, expected)
    assert not torch.equal(got, outcome(both, phase, spec)[0]), "other scales, other numbers"


def test_it_is_called_by_both_names():
    assert backend_by_phase(TorchSdpaBackend, CpuAttnBackend, [NEEDS]).name == "CPU_ATTN, prefill TORCH_SDPA"
    assert backend_by_phase(CpuAttnBackend, CpuAttnBackend, [NEEDS]).name == "CPU_ATTN"


def test_each_phase_asks_its_own_backend():
    class Never(TorchSdpaBackend):
        @classmethod
        def refuse(cls, platform, needs):
            return ["it does not want to"]

    both = backend_by_phase(Never, CpuAttnBackend, [NEEDS])
    cpu = Platform(DeviceKind.CPU, "CPU")
    asked = {phase: AttentionNeeds(SPEC, torch.float32, 16, phase) for phase in (*Phase, None)}
    assert both.refuse(cpu, asked[Phase.PREFILL]) == ["it does not want to"]
    assert both.refuse(cpu, asked[Phase.DECODE]) == []
    assert both.refuse(cpu, asked[None]) == ["it does not want to"]


def test_backends_that_lay_the_cache_out_in_different_ways_refuse_each_other():
    class HeadsFirst(TorchSdpaBackend):
        name = "HEADS_FIRST"

        @staticmethod
        def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size):
            return (num_blocks, 2, num_kv_heads, block_size, head_size)

    with pytest.raises(AttentionBackendError, match=r"HEADS_FIRST for prefill.*\(2, 2, 16, 16\).*\(2, 16, 2, 16\)"):
        backend_by_phase(HeadsFirst, CpuAttnBackend, [NEEDS])


def test_a_batch_of_single_tokens_is_a_decode_batch():
    assert phase_of(build_metadata([1, 1], [1, 30], [[0], [1, 2]], 16)) is Phase.DECODE
    assert phase_of(build_metadata([1, 2], [1, 30], [[0], [1, 2]], 16)) is Phase.PREFILL


def test_what_can_be_captured_is_what_the_backend_of_the_phase_can():
    both = backend_by_phase(TorchSdpaBackend, CpuAttnBackend, [NEEDS])
    builder = both.builder_class(SPEC, torch.float32, 16, torch.device("cpu"))
    prefill = TorchSdpaBackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu"))
    decode = CpuAttnBackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu"))
    assert builder.graph_safe_prefill == prefill.graph_safe_prefill
    assert builder.graph_safe_decode == decode.graph_safe_decode
