"""PALLAS: JAX's TPU kernels, run in Pallas' interpreter, against float64; and the same calls through torch_xla."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from attention.backends.common.batch_split import split_batch
from attention.backends.pallas import backend
from attention.backends.pallas.backend import PallasBackend
from attention.backends.pallas.kernels import InterpretedKernels, XlaKernels, interpret_on_cpu, kernels_for
from attention.errors import AttentionBackendError, AttentionInputError
from attention.platform import Platform
from attention.selection.selector import unsupported_reasons
from attention.spec import FP8, AttentionNeeds, AttentionSpec, Feature, Phase
from paged_case import PagedCase, paged_case

pytestmark = pytest.mark.slow

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=128, scale=128**-0.5)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def case_of(
    spec: AttentionSpec, lens: Sequence[tuple[int, int]], block_size: int = 16, dtype: torch.dtype = torch.float32
) -> PagedCase:
    """Numbers that bf16 can hold: the decode kernel rounds keys and values to it, and then nothing is lost in fp32."""
    case = paged_case(spec, lens, block_size, torch.bfloat16)
    tensors = {name: getattr(case, name).to(dtype) for name in ("query", "key", "value", "cache")}
    return replace(case, **tensors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_in_the_interpreter(dtype: torch.dtype) -> None:
    """Ragged lengths with 1 and block boundaries, shuffled blocks, NaN in every slot without a token."""
    lens = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 33), (1, 70)]
    case = case_of(SPEC, lens, 16, dtype)
    with interpret_on_cpu():
        got = case.run(PallasBackend)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), case.expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [(2, 2), (8, 1)], ids=["mha", "mqa"])
def test_decode_of_other_head_counts(heads: tuple[int, int]) -> None:
    case = case_of(AttentionSpec(*heads, 128, 0.1), [(1, 40), (1, 9)], 32)
    with interpret_on_cpu():
        got = case.run(PallasBackend)
    torch.testing.assert_close(got.double(), case.expected, rtol=2e-5, atol=2e-5)


def test_more_pages_than_the_kernel_fetches_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PAGES_AT_ONCE", 32)
    case = case_of(SPEC, [(1, 100), (1, 20)], 16)
    metadata = PallasBackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu")).build(case.common)
    assert (metadata.pages_per_sequence, metadata.pages_per_compute_block) == (8, 2)
    with interpret_on_cpu():
        got = case.run(PallasBackend)
    torch.testing.assert_close(got.double(), case.expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_prompts_chunks_and_decode_in_one_batch(dtype: torch.dtype) -> None:
    case = case_of(SPEC, ((1, 33), (20, 20), (1, 1), (7, 40)), 16, dtype)
    poisoned = torch.full(case.query.shape, float("nan"), dtype=dtype)
    with interpret_on_cpu():
        got = case.run(PallasBackend, poisoned)
    assert got is poisoned
    torch.testing.assert_close(got.double(), case.expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_prompt_longer_than_one_tile() -> None:
    case = case_of(AttentionSpec(1, 1, 128, 0.09), [(60, 150)], 16)
    with interpret_on_cpu():
        got = case.run(PallasBackend)
    torch.testing.assert_close(got.double(), case.expected, rtol=2e-5, atol=2e-5)


def test_new_tokens_are_stored_and_nothing_else_is_touched() -> None:
    case = case_of(SPEC, [(1, 20), (1, 7)], 16)
    before = case.cache.clone()
    with interpret_on_cpu():
        case.run(PallasBackend)
    for token, slot in enumerate(case.common.slot_mapping.tolist()):
        before[slot // 16, 0, slot % 16] = case.key[token]
        before[slot // 16, 1, slot % 16] = case.value[token]
    torch.testing.assert_close(case.cache, before, rtol=0, atol=0, equal_nan=True)


def test_pages_are_heads_first_and_zero_where_no_token_is() -> None:
    case = case_of(SPEC, [(1, 18), (1, 3)], 16)
    decode = split_batch(case.common, 16).decode
    assert decode is not None
    keys, values = backend.pages(case.cache, decode, 4)
    assert keys.shape == values.shape == (2, 2 * 4, 16, 128)
    table = case.common.block_tables
    assert torch.equal(keys[1, 0], case.cache[table[0, 0], 0, :, 1])
    assert torch.equal(values[1, 0], case.cache[table[0, 0], 1, :, 1])
    assert torch.equal(values[0, 4, :2], case.cache[table[1, 0], 1, :2, 0])
    assert not keys[:, 1, 2:].any()
    assert not keys[:, 2:4].any()
    assert not keys[:, 5:].any()


def test_a_cpu_is_no_tpu() -> None:
    case = case_of(SPEC, [(1, 4)], 16)
    with pytest.raises(AttentionInputError, match="PALLAS runs on TPUs, not on cpu tensors"):
        case.run(PallasBackend)
    metadata = PallasBackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu")).build(case.common)
    impl = PallasBackend.impl_class(SPEC)
    with interpret_on_cpu():
        impl.forward(case.query, case.key, case.value, case.cache, metadata)
    with pytest.raises(AttentionInputError, match="not on cpu tensors"):
        impl.forward(case.query, case.key, case.value, case.cache, metadata)
    needs = AttentionNeeds(SPEC, torch.bfloat16, 16)
    with interpret_on_cpu():
        assert "runs on tpu, not on cpu" in unsupported_reasons("PALLAS", Platform.of("cpu"), [needs])


def test_what_the_kernels_cannot_do() -> None:
    tpu = Platform.simulate("tpu")

    def reasons(spec: AttentionSpec, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        return unsupported_reasons(
            "PALLAS", tpu, [AttentionNeeds(spec, dtype, 16, Phase.DECODE, frozenset({Feature.PREFIX}))]
        )

    assert reasons(SPEC) == []
    assert reasons(AttentionSpec(4, 2, 64, 0.1)) == ["head size 64 is not one of: 128 to 256, multiples of 128"]
    assert reasons(AttentionSpec(4, 2, 128, 0.1, logits_soft_cap=30.0)) == ["the prefill kernel has no soft cap"]
    assert reasons(AttentionSpec(4, 2, 128, 0.1, sliding_window=9)) == ["neither kernel has a sliding window"]
    assert "int8 and FP8 pages" in reasons(AttentionSpec(4, 2, 128, 0.1, kv_cache_dtype=FP8))[0]
    assert reasons(SPEC, torch.float16) == ["dtype float16 is none of bfloat16"]


class TestThroughTorchXla:
    """The calls into `torch_xla.experimental.custom_kernel`, whose functions here run the interpreter."""

    @pytest.fixture
    def custom_kernel(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """A module with the signatures of torch_xla 2.x (torch_xla/experimental/custom_kernel.py)."""
        interpreter = InterpretedKernels()

        def flash_attention(  # type: ignore[no-untyped-def]
            q, k, v, causal=False, q_segment_ids=None, kv_segment_ids=None, sm_scale=1.0, *, ab=None,
            partition_spec=None, mesh=None,
        ):  # fmt: skip
            assert causal
            assert (q_segment_ids, kv_segment_ids, ab) == (None, None, None)
            return interpreter.flash(q, k, v, sm_scale)

        def paged_attention(  # type: ignore[no-untyped-def]
            q, k_pages, v_pages, lengths, page_indices, pages_per_compute_block, megacore_mode=None,
            attn_logits_soft_cap=None,
        ):  # fmt: skip
            assert (megacore_mode, attn_logits_soft_cap) == (None, None)
            assert lengths.dtype == page_indices.dtype == torch.int32
            return interpreter.paged(q, k_pages, v_pages, lengths, page_indices, pages_per_compute_block)

        module = ModuleType("torch_xla.experimental.custom_kernel")
        module.flash_attention = flash_attention  # type: ignore[attr-defined]
        module.paged_attention = paged_attention  # type: ignore[attr-defined]
        for name in ("torch_xla", "torch_xla.experimental"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    def test_a_mixed_batch(self, custom_kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "kernels_for", lambda device: XlaKernels())
        case = case_of(SPEC, [(1, 33), (20, 20), (7, 40)], 16)
        torch.testing.assert_close(case.run(PallasBackend).double(), case.expected, rtol=2e-5, atol=2e-5)

    def test_xla_tensors_go_there(self, custom_kernel: ModuleType) -> None:
        assert isinstance(kernels_for(torch.device("xla")), XlaKernels)

    def test_without_torch_xla(self) -> None:
        with pytest.raises(AttentionBackendError, match="PALLAS needs torch-xla"):
            kernels_for(torch.device("xla"))


def test_the_kernels_still_take_what_is_passed() -> None:
    """The interpreter runs whatever JAX is installed; the keywords must be there by name."""
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    assert {"causal", "sm_scale"} <= set(inspect.signature(flash_attention).parameters)
    assert list(inspect.signature(paged_attention).parameters)[:5] == [
        "q",
        "k_pages",
        "v_pages",
        "lengths",
        "page_indices",
    ]
