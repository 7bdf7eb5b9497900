"""Fused operations: each kernel against its plain torch twin, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from attention.backend import KVScales
from workers.ops.cache_write import CacheWrite
from workers.ops.qk_norm_rope import cos_sin_table, qk_norm_rope_, qk_norm_rope_torch_
from workers.ops.rms_norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from workers.ops.rope_config import Llama3Scaling, RopeConfig, YarnScaling
from workers.ops.rotary_frequencies import Rotary
from workers.ops.silu_and_mul import silu_and_mul, silu_and_mul_torch
from workers.sampling.ops.greedy import greedy_sample, greedy_sample_torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """The launch functions, of kernels that the interpreter runs where there is no GPU."""
    # What is decorated while the variable is set is interpreted: these modules, and Triton's own library if it is new.
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from workers.ops.triton import qk_norm_rope, rms_norm, silu_and_mul
        from workers.sampling.ops.triton import greedy
    for function in (language.sum, qk_norm_rope.qk_norm_rope_kernel):
        if DEVICE.type == "cpu" and type(function).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return SimpleNamespace(
        rms_norm=rms_norm.launch_rms_norm,
        rope=qk_norm_rope.launch_qk_norm_rope,
        silu_and_mul=silu_and_mul.launch_silu_and_mul,
        greedy=greedy.launch_greedy_sample,
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close_in_ulps(actual: torch.Tensor, expected: torch.Tensor, ulps: float = 1.0) -> None:
    """`expected` is float64, or another rounding of the same.

    What is added in float32 errs by a few units of the row's largest, however small the sum is.
    """
    expected = expected.double()
    allowed = ulps * torch.finfo(actual.dtype).eps * expected.abs()
    allowed += 16 * torch.finfo(torch.float32).eps * expected.abs().amax(dim=-1, keepdim=True) + 1e-30
    error = ((actual.double() - expected).abs() / allowed).max() * ulps
    assert error <= ulps, f"off by {error} units in the last place"


# --- RMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (1, 4096), (5, 100), (3, 7, 48), (2, 3, 2, 16), (130, 128)])
def test_rms_norm_kernel_equals_its_twin(kernels: SimpleNamespace, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    out = torch.full_like(x, NAN)
    kernels.rms_norm(x, weight, EPS, out)
    assert_close_in_ulps(out, rms_norm_torch(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    x, weight = randn(32, 512, dtype=dtype), randn(512, dtype=dtype, seed=1)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()
    assert_close_in_ulps(rms_norm(x, weight, EPS), exact, ulps=0.51)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_multiply_by_a_float32_weight_before_they_round(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    x, residual, weight = randn(6, 256, dtype=dtype), randn(6, 256, dtype=dtype, seed=2), 1 + randn(256, seed=1) / 500
    assert not torch.equal(weight, weight.to(dtype).float())
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()
    assert_close_in_ulps(rms_norm(x, weight, EPS), exact, ulps=0.51)
    expected = rms_norm_torch(x, weight, EPS)
    out = torch.full_like(x, NAN)
    kernels.rms_norm(x, weight, EPS, out)
    assert_close_in_ulps(out, expected)
    kernels.rms_norm(x, weight, EPS, out, residual)
    assert_close_in_ulps(out, rms_norm_torch(residual, weight, EPS))


def test_rms_norm_kernel_reads_a_strided_view_and_leaves_the_rest(kernels: SimpleNamespace) -> None:
    wide = randn(6, 9, 32)
    before = wide.clone()
    view, weight = wide[:, 2:7], randn(32, seed=1)
    out = torch.full((6, 5, 32), NAN, device=DEVICE)
    kernels.rms_norm(view, weight, EPS, out)
    torch.testing.assert_close(out, rms_norm_torch(view, weight, EPS))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (9, 4096)])
def test_add_rms_norm_kernel_equals_its_twin(
    kernels: SimpleNamespace, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=2), randn(shape[-1], dtype=dtype)
    expected_residual = residual.clone()
    expected = add_rms_norm_torch(x, expected_residual, weight, EPS)
    out = torch.full_like(x, NAN)
    kernels.rms_norm(x, weight, EPS, out, residual)
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:  # the interpreter rounds to bfloat16 towards zero
        assert_close_in_ulps(residual, expected_residual)
        expected = rms_norm_torch(residual, weight, EPS)
    else:
        assert torch.equal(residual, expected_residual)
    assert_close_in_ulps(out, expected)


def test_add_rms_norm_normalises_the_rounded_sum() -> None:
    x, residual = (randn(4, 64, dtype=torch.bfloat16, seed=i) for i in range(2))
    weight = randn(64, dtype=torch.bfloat16, seed=2)
    total = (residual.float() + x.float()).bfloat16()
    out = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(out, rms_norm(total, weight, EPS))


def test_norms_write_in_place_when_asked(kernels: SimpleNamespace) -> None:
    x, residual, weight = randn(4, 96), randn(4, 96, seed=1), randn(96, seed=2)
    expected = rms_norm_torch(x, weight, EPS)
    in_place = x.clone()
    assert rms_norm(in_place, weight, EPS, out=in_place) is in_place
    kernels.rms_norm(x, weight, EPS, x)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(in_place, expected)
    expected = rms_norm_torch(x + residual, weight, EPS)
    assert add_rms_norm(x, residual, weight, EPS, out=x) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("hidden_size", [48, 128, 4096])
def test_a_row_does_not_depend_on_the_others(kernels: SimpleNamespace, hidden_size: int) -> None:
    x, weight = randn(37, hidden_size, dtype=torch.bfloat16), randn(hidden_size, dtype=torch.bfloat16, seed=1)
    together, alone = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(x, weight, EPS, together)
    for row in range(len(x)):
        kernels.rms_norm(x[row : row + 1], weight, EPS, alone[row : row + 1])
    assert torch.equal(together, alone)


# --- Rotary position embedding

LLAMA3 = RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64))
POSITIONS = torch.tensor([0, 1, 2, 511, 7, 300], device=DEVICE)


def rope_inputs(
    num_q_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, table_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qkv = randn(len(POSITIONS), num_q_heads + 2 * num_kv_heads, head_size, dtype=dtype)
    norm_weight = randn(num_q_heads + num_kv_heads, head_size, dtype=dtype, seed=1)
    return qkv, cos_sin_table(LLAMA3, head_size, 512, DEVICE, table_dtype), norm_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_size"), [(4, 2, 16), (5, 1, 80), (32, 8, 128), (1, 1, 2)]
)
def test_rope_kernel_equals_its_twin(
    kernels: SimpleNamespace, num_q_heads: int, num_kv_heads: int, head_size: int, normed: bool, dtype: torch.dtype
) -> None:
    qkv, table, norm_weight = rope_inputs(num_q_heads, num_kv_heads, head_size, dtype)
    weight = norm_weight if normed else None
    expected = qkv.clone()
    qk_norm_rope_torch_(expected, num_q_heads, num_kv_heads, POSITIONS, table, weight, EPS)
    values = qkv[:, num_q_heads + num_kv_heads :].clone()
    kernels.rope(qkv, num_q_heads, num_kv_heads, POSITIONS, table, weight, EPS, None)
    assert_close_in_ulps(qkv, expected)
    assert torch.equal(qkv[:, num_q_heads + num_kv_heads :], values)


@pytest.mark.parametrize("rope", [LLAMA3, RopeConfig(10000.0, None, 0.5), RopeConfig(10000.0, interleaved=True)])
def test_rope_kernel_normalises_by_a_float32_weight(kernels: SimpleNamespace, rope: RopeConfig) -> None:
    qkv, _, _ = rope_inputs(4, 2, 32, torch.bfloat16)
    weight, table = 1 + randn(6, 32, seed=1) / 500, table_of(rope, 32)
    expected = qkv.clone()
    qk_norm_rope_torch_(expected, 4, 2, POSITIONS, table, weight, EPS, None, rope.interleaved)
    kernels.rope(qkv, 4, 2, POSITIONS, table, weight, EPS, None, rope.interleaved)
    assert_close_in_ulps(qkv, expected)


@pytest.mark.parametrize("rope", [RopeConfig(10000.0), LLAMA3])
def test_rope_agrees_with_the_rotary_of_the_model(rope: RopeConfig) -> None:
    qkv, _, norm_weight = rope_inputs(4, 2, 32, torch.float32)
    rotary = Rotary(rope, 32, torch.float32, DEVICE)
    normalized = F.rms_norm(qkv[:, :6], (32,), None, EPS) * norm_weight
    expected = rotary.rotate(normalized, rotary.angles(POSITIONS))
    qk_norm_rope_(qkv, 4, 2, POSITIONS, cos_sin_table(rope, 32, 512, DEVICE), norm_weight, EPS)
    torch.testing.assert_close(qkv[:, :6], expected)


def test_rope_kernel_works_inside_a_wider_tensor(kernels: SimpleNamespace) -> None:
    wide = randn(len(POSITIONS), 10, 32)
    before = wide.clone()
    table = cos_sin_table(LLAMA3, 32, 512, DEVICE)
    expected = wide[:, 1:9].clone()
    qk_norm_rope_torch_(expected, 4, 2, POSITIONS, table)
    kernels.rope(wide[:, 1:9], 4, 2, POSITIONS, table, None, EPS, None)
    torch.testing.assert_close(wide[:, 1:9], expected)
    assert torch.equal(wide[:, 0], before[:, 0])
    assert torch.equal(wide[:, 9], before[:, 9])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_heads", [1, 20])
def test_rope_kernel_rotates_parts_of_wider_heads_that_are_alone(
    kernels: SimpleNamespace, num_heads: int, interleaved: bool
) -> None:
    """As latent attention has them: the last part of every query, and one key of no head's."""
    wide = randn(len(POSITIONS), num_heads, 48)
    before = wide.clone()
    rope = RopeConfig(10000.0, YarnScaling(4.0, 64), interleaved=interleaved)
    rotary = Rotary(rope, 16, torch.float32, DEVICE)
    kernels.rope(wide[..., 32:], num_heads, 0, POSITIONS, table_of(rope, 16), None, EPS, None, interleaved)
    torch.testing.assert_close(wide[..., 32:], rotary.rotate(before[..., 32:], rotary.angles(POSITIONS)))
    assert torch.equal(wide[..., :32], before[..., :32])
    qk_norm_rope_(before[..., 32:], num_heads, 0, POSITIONS, table_of(rope, 16), interleaved=interleaved)
    torch.testing.assert_close(wide, before)


def test_rope_kernel_reads_a_table_of_the_models_dtype(kernels: SimpleNamespace) -> None:
    qkv, table, _ = rope_inputs(4, 2, 32, torch.bfloat16, torch.bfloat16)
    expected = qkv.clone()
    qk_norm_rope_torch_(expected, 4, 2, POSITIONS, table)
    kernels.rope(qkv, 4, 2, POSITIONS, table, None, EPS, None)
    assert_close_in_ulps(qkv, expected)


PARTS = [
    RopeConfig(10000.0, None, 0.5, interleaved=False),
    RopeConfig(10000.0, YarnScaling(4.0, 64), 0.75, interleaved=False),
    RopeConfig(10000.0, None, 1.0, interleaved=True),
    RopeConfig(10000.0, YarnScaling(4.0, 64), 0.75, interleaved=True),
    None,
]


def table_of(rope: RopeConfig | None, head_size: int) -> torch.Tensor | None:
    return None if rope is None else cos_sin_table(rope, head_size, 512, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rope", PARTS)
def test_rope_kernel_rotates_parts_and_pairs_as_its_twin(
    kernels: SimpleNamespace, rope: RopeConfig | None, normed: bool, dtype: torch.dtype
) -> None:
    qkv, _, norm_weight = rope_inputs(5, 2, 80, dtype)
    weight, table = norm_weight if normed else None, table_of(rope, 80)
    interleaved = rope is not None and rope.interleaved
    expected, before = qkv.clone(), qkv.clone()
    qk_norm_rope_torch_(expected, 5, 2, POSITIONS, table, weight, EPS, None, interleaved)
    kernels.rope(qkv, 5, 2, POSITIONS, table, weight, EPS, None, interleaved)
    assert_close_in_ulps(qkv, expected)
    assert torch.equal(qkv[:, 7:], before[:, 7:])
    rotated = 0 if rope is None else rope.rotary_dim(80)
    assert torch.equal(qkv[:, :7, rotated:], before[:, :7, rotated:]) != (normed and rotated < 80)


@pytest.mark.parametrize("rope", PARTS)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_kernel_stores_parts_and_pairs(kernels: SimpleNamespace, rope: RopeConfig | None, normed: bool) -> None:
    qkv, _, norm_weight = rope_inputs(4, 2, 48, torch.bfloat16)
    kv_cache = torch.zeros(8, 2, 16, 2, 48, device=DEVICE).bfloat16()
    weight, interleaved = norm_weight if normed else None, rope is not None and rope.interleaved
    cache = CacheWrite(kv_cache, SLOTS)
    kernels.rope(qkv, 4, 2, POSITIONS, table_of(rope, 48), weight, EPS, cache, interleaved)
    for token, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, 16)
            assert torch.equal(kv_cache[block, 0, offset], qkv[token, 4:6])
            assert torch.equal(kv_cache[block, 1, offset], qkv[token, 6:])
    assert int((kv_cache != 0).any(-1).any(-1).any(1).sum()) == 4


@pytest.mark.parametrize("rope", PARTS)
def test_rope_kernel_stores_parts_and_pairs_in_fp8(kernels: SimpleNamespace, rope: RopeConfig | None) -> None:
    qkv, _, _ = rope_inputs(4, 2, 48, torch.float32)
    interleaved, scales = rope is not None and rope.interleaved, KVScales(0.7, 0.21)
    caches = [torch.zeros(8, 2, 16, 2, 48, device=DEVICE).to(FP8) for _ in range(2)]
    table = table_of(rope, 48)
    twin, kernel = (CacheWrite(cache, SLOTS, scales) for cache in caches)
    qk_norm_rope_torch_(qkv.clone(), 4, 2, POSITIONS, table, None, EPS, twin, interleaved)
    kernels.rope(qkv, 4, 2, POSITIONS, table, None, EPS, kernel, interleaved)
    wanted, stored = (cache.float() for cache in caches)
    assert (wanted != 0).any(dim=(-1, -2)).sum() == 8
    assert (stored != wanted)[wanted != 0].float().mean() < 0.05  # see above


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_and_parts_of_heads_against_float64(kernels: SimpleNamespace, interleaved: bool) -> None:
    rope = RopeConfig(10000.0, YarnScaling(4.0, 64), 0.5, interleaved)
    qkv, _, weight = rope_inputs(3, 1, 32, torch.float32)
    exact = qkv[:, :4].double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS) * weight.double()
    table = cos_sin_table(rope, 32, 512, DEVICE)[POSITIONS].double().unsqueeze(1)
    for pair in range(8):
        one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 8)
        cosine, sine = table[..., pair], table[..., pair + 8]
        a, b = exact[..., one].clone(), exact[..., other].clone()
        exact[..., one], exact[..., other] = a * cosine - b * sine, b * cosine + a * sine
    kernels.rope(qkv, 3, 1, POSITIONS, cos_sin_table(rope, 32, 512, DEVICE), weight, EPS, None, interleaved)
    torch.testing.assert_close(qkv[:, :4].double(), exact, rtol=1e-5, atol=1e-6)


SLOTS = torch.tensor([5, -1, 0, 63, 17, -1], device=DEVICE)


@pytest.mark.parametrize("block_size", [1, 16, 24])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_size"), [(4, 2, 16), (5, 1, 80), (32, 8, 128)])
def test_rope_kernel_stores_keys_and_values(
    kernels: SimpleNamespace, num_q_heads: int, num_kv_heads: int, head_size: int, block_size: int
) -> None:
    qkv, table, norm_weight = rope_inputs(num_q_heads, num_kv_heads, head_size, torch.bfloat16)
    kv_cache = randn(64, 2, block_size, num_kv_heads, head_size, dtype=torch.bfloat16, seed=3)
    before = kv_cache.clone()
    kernels.rope(qkv, num_q_heads, num_kv_heads, POSITIONS, table, norm_weight, EPS, CacheWrite(kv_cache, SLOTS))
    rotated = num_q_heads + num_kv_heads
    written = torch.zeros(kv_cache.shape[0], block_size, dtype=torch.bool)
    for token, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            assert torch.equal(kv_cache[block, 0, offset], qkv[token, num_q_heads:rotated])
            assert torch.equal(kv_cache[block, 1, offset], qkv[token, rotated:])
            written[block, offset] = True
    untouched = (~written).to(DEVICE)[:, None].expand(-1, 2, -1)
    assert torch.equal(kv_cache[untouched], before[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fp8", [False, True])
def test_rope_kernel_stores_what_its_twin_stores(kernels: SimpleNamespace, fp8: bool, dtype: torch.dtype) -> None:
    qkv, table, _ = rope_inputs(4, 2, 32, dtype)
    qkv *= 100.0  # some beyond FP8's range
    scales = KVScales(0.7, 0.21) if fp8 else KVScales()
    cache_dtype = FP8 if fp8 else dtype
    caches = [torch.zeros(8, 2, 16, 2, 32, device=DEVICE).to(cache_dtype) for _ in range(2)]
    expected = qkv.clone()
    qk_norm_rope_torch_(expected, 4, 2, POSITIONS, table, cache=CacheWrite(caches[0], SLOTS, scales))
    kernels.rope(qkv, 4, 2, POSITIONS, table, None, EPS, CacheWrite(caches[1], SLOTS, scales))
    wanted, stored = (cache.float() for cache in caches)
    assert wanted.abs().max() > 200
    if not fp8:
        assert_close_in_ulps(stored.to(dtype), wanted)
        return
    # A key that rounds otherwise before may become the FP8 number beside; the interpreter loses the carry of a
    # mantissa that rounds up to the next power of two.
    assert (stored != wanted)[wanted != 0].float().mean() < (0.01 if DEVICE.type == "cuda" else 0.05)
    if DEVICE.type == "cuda":
        torch.testing.assert_close(stored, wanted, rtol=0.126, atol=0.02)
        assert torch.equal(stored[:, 1], wanted[:, 1])  # values are not rotated


def test_rope_dispatch_stores_too() -> None:
    qkv, table, _ = rope_inputs(4, 2, 16, torch.float32)
    kv_cache = torch.zeros(8, 2, 16, 2, 16, device=DEVICE)
    qk_norm_rope_(qkv, 4, 2, POSITIONS, table, cache=CacheWrite(kv_cache, SLOTS))
    assert torch.equal(kv_cache[0, 0, 5], qkv[0, 4:6])
    assert torch.equal(kv_cache[3, 1, 15], qkv[3, 6:8])
    assert int((kv_cache != 0).any(-1).any(-1).any(1).sum()) == 4


# --- SiLU and multiply


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 96), (7, 1024), (3, 2500)])
def test_silu_and_mul_kernel_equals_its_twin(
    kernels: SimpleNamespace, num_tokens: int, size: int, dtype: torch.dtype
) -> None:
    gate_up = (randn(num_tokens, 2 * size) * 4).to(dtype)
    out = torch.full((num_tokens, size), NAN, dtype=dtype, device=DEVICE)
    kernels.silu_and_mul(gate_up, out)
    assert_close_in_ulps(out, silu_and_mul_torch(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_rounds_once(dtype: torch.dtype) -> None:
    gate_up = randn(16, 256, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close_in_ulps(silu_and_mul(gate_up), F.silu(gate) * up, ulps=0.51)


def test_silu_and_mul_of_extremes(kernels: SimpleNamespace) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 2.0, 2.0]], device=DEVICE)
    out = torch.empty(1, 3, device=DEVICE)
    kernels.silu_and_mul(gate_up, out)
    assert out.tolist() == [[0.0, 400.0, 0.0]]


def test_silu_and_mul_with_rows_of_wider_tensors(kernels: SimpleNamespace) -> None:
    gate_up, out = randn(5, 100)[:, :64], torch.zeros(5, 50, device=DEVICE)
    kernels.silu_and_mul(gate_up, out[:, :32])
    torch.testing.assert_close(out[:, :32], silu_and_mul_torch(gate_up))
    assert not out[:, 32:].any()
    assert silu_and_mul(gate_up, out[:, 16:48]).data_ptr() == out[:, 16:48].data_ptr()
    torch.testing.assert_close(out[:, 16:48], silu_and_mul_torch(gate_up))


# --- Greedy sampling


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 512), (5, 9000), (2, 20000)])
def test_greedy_kernel_equals_its_twin(
    kernels: SimpleNamespace, num_rows: int, vocab_size: int, dtype: torch.dtype
) -> None:
    logits = randn(num_rows, vocab_size, dtype=dtype)  # in 16 bits many are equal
    out = torch.full((num_rows,), -7, dtype=torch.int64, device=DEVICE)
    kernels.greedy(logits, out)
    assert torch.equal(out, greedy_sample_torch(logits))
    assert torch.equal(out.cpu(), logits.float().cpu().argmax(dim=-1))


def _rows_without_a_token() -> torch.Tensor:
    """Each second row cannot be sampled; the others can, at 4999."""
    logits = torch.full((8, 9000), -INF, device=DEVICE)
    logits[:, 4999] = 1.0
    logits[1, 0] = NAN
    logits[3, 8999] = INF
    logits[5] = -INF
    logits[7, 4999] = NAN
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_token_give_minus_one(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    logits = _rows_without_a_token().to(dtype)
    out = torch.empty(8, dtype=torch.int64, device=DEVICE)
    kernels.greedy(logits, out)
    assert out.tolist() == [4999, -1] * 4
    assert greedy_sample(logits).tolist() == [4999, -1] * 4


@pytest.mark.parametrize("equal", [(0, 8999), (4095, 4096), (17, 18, 4113), tuple(range(9000))])
def test_of_equal_logits_the_lowest_id_is_taken(kernels: SimpleNamespace, equal: tuple[int, ...]) -> None:
    logits = randn(1, 9000)
    logits[0, list(equal)] = 50.0
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    kernels.greedy(logits, out)
    assert out.item() == equal[0]
    assert greedy_sample(logits, out=out) is out
    assert out.item() == equal[0]


def test_greedy_kernel_reads_rows_of_a_wider_tensor(kernels: SimpleNamespace) -> None:
    wide = randn(3, 700)
    wide[:, 600:] = 100.0  # padding of the vocabulary, not to be seen
    out = torch.empty(3, dtype=torch.int64, device=DEVICE)
    kernels.greedy(wide[:, :600], out)
    assert torch.equal(out, wide[:, :600].argmax(dim=-1))


# --- All of them


def test_no_tokens_are_no_work(kernels: SimpleNamespace) -> None:
    empty = torch.empty(0, 64, device=DEVICE)
    no_tokens = torch.empty(0, dtype=torch.int64, device=DEVICE)
    kernels.rms_norm(empty, torch.ones(64, device=DEVICE), EPS, empty)
    kernels.silu_and_mul(empty, empty[:, :32])
    kernels.greedy(empty, no_tokens)
    table = cos_sin_table(LLAMA3, 16, 8, DEVICE)
    kernels.rope(empty.view(0, 4, 16), 2, 1, no_tokens, table, None, EPS, None)
    assert rms_norm(empty, torch.ones(64, device=DEVICE), EPS).shape == (0, 64)
    assert silu_and_mul(empty).shape == (0, 32)
    assert greedy_sample(empty).shape == (0,)


_X, _WEIGHT = torch.zeros(2, 8), torch.zeros(8)
_QKV, _TABLE, _TWO = torch.zeros(2, 4, 8), torch.zeros(9, 8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rms_norm(_X, torch.zeros(7), EPS), "weight of"),
        (lambda: rms_norm(_X, _WEIGHT.half(), EPS), "float16"),
        (lambda: rms_norm(_X, _WEIGHT, EPS, out=torch.zeros(3, 8)), "out of"),
        (lambda: add_rms_norm(_X, torch.zeros(8, 2).T, _WEIGHT, EPS), "residual of"),
        (lambda: silu_and_mul(torch.zeros(2, 7)), "gate_up of"),
        (lambda: silu_and_mul(_X, out=_X), "out of"),
        (lambda: greedy_sample(torch.zeros(2, 0)), "logits of"),
        (lambda: greedy_sample(_X, out=_TWO.int()), "out of torch.int32"),
        (lambda: qk_norm_rope_(_QKV, 3, 1, _TWO, _TABLE), r"3 \+ 2 \* 1 heads"),
        (lambda: qk_norm_rope_(_QKV, 2, 1, _TWO.int(), _TABLE), "positions of torch.int32"),
        (lambda: qk_norm_rope_(_QKV, 2, 1, _TWO, _TABLE[:, :3]), "table"),
        (lambda: qk_norm_rope_(_QKV, 2, 1, _TWO, torch.zeros(9, 10)), "table of cosines and sines of shape .9, 10."),
        (lambda: qk_norm_rope_(_QKV, 2, 1, _TWO, _TABLE, torch.ones(8)), "norm weight"),
        (lambda: qk_norm_rope_(_QKV, 2, 1, _TWO, _TABLE, cache=_cache((3, 2, 4, 2, 8), 2)), "KV cache of shape"),
        (lambda: qk_norm_rope_(_QKV, 2, 1, _TWO, _TABLE, cache=_cache((3, 2, 4, 1, 8), 3)), "slot_mapping of"),
        (
            lambda: qk_norm_rope_(_QKV.bfloat16(), 2, 1, _TWO, _TABLE, cache=_cache((3, 2, 4, 1, 8), 2)),
            "KV cache of torch.float32",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def _cache(shape: tuple[int, ...], num_tokens: int) -> CacheWrite:
    return CacheWrite(torch.zeros(shape), torch.zeros(num_tokens, dtype=torch.int64))


def test_the_twins_need_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from workers.ops import qk_norm_rope as rope, rms_norm, silu_and_mul\n"
        "from workers.sampling.ops import greedy, sample_tokens, top_logprobs\n"
        "x, weight = torch.ones(2, 8), torch.ones(8)\n"
        "rms_norm.rms_norm(x, weight, 1e-5); rms_norm.add_rms_norm(x, x.clone(), weight, 1e-5)\n"
        "silu_and_mul.silu_and_mul(x)\n"
        "rope.qk_norm_rope_(x.view(2, 4, 2), 2, 1, torch.arange(2), torch.ones(2, 2))\n"
        "print(greedy.greedy_sample(torch.eye(2)).tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[0, 1]", result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_captured_graph_repeats_what_eager_calls_do() -> None:
    hidden, residual, weight = (randn(5, 256, dtype=torch.bfloat16, seed=i) for i in range(3))
    weight = weight[0].contiguous()
    table, positions = cos_sin_table(LLAMA3, 64, 512, DEVICE), POSITIONS[:5].contiguous()
    cache = CacheWrite(torch.zeros(8, 2, 16, 1, 64, device=DEVICE).bfloat16(), SLOTS[:5].contiguous())

    def step(x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        normalized = add_rms_norm(x, stream, weight, EPS)
        qk_norm_rope_(normalized.view(5, 4, 64), 2, 1, positions, table, cache=cache)
        return greedy_sample(rms_norm(silu_and_mul(normalized.repeat(1, 2)), weight, EPS))

    eager_residual = residual.clone()
    expected = step(hidden, eager_residual)
    expected_cache = cache.kv_cache.clone()
    static_residual, graph = residual.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step(hidden, static_residual)
    for _ in range(20):
        static_residual.copy_(residual)
        cache.kv_cache.zero_()
        graph.replay()
        assert torch.equal(tokens, expected)
        assert torch.equal(static_residual, eager_residual)
        assert torch.equal(cache.kv_cache, expected_cache)
