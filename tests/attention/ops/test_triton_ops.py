"""The Triton kernels against plain torch in float64: interpreted on the CPU, compiled where there is CUDA."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from long_tails import slow_unless

pytest.importorskip("triton")

from attention.errors import AttentionInputError
from attention.ops.triton.decode import paged_decode
from attention.ops.triton.launch import INTERPRETED, DeviceTraits
from attention.ops.triton.merge_attn_states import merge_attn_states
from attention.ops.triton.prefill import paged_prefill, varlen_prefill
from attention.ops.triton.reshape_and_cache import reshape_and_cache
from attention.ops.triton.tuning import MAX_SPLITS, Splits, Tile, choose_splits, decode_tile, prefill_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
H200 = DeviceTraits("sm90", 132, 227 << 10, True)

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs TRITON_INTERPRET=1 or a CUDA device")


@dataclass(frozen=True)
class Rules:
    """What a query sees and how, as the kernels' keyword arguments say it; masks are one (queries, keys) a sequence."""

    causal: bool = True
    sliding_window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0
    custom: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; `lens` are (queries, keys) of each sequence."""

    lens: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None

    @property
    def scale(self) -> float:
        return 0.7 * self.head_size**-0.5

    @property
    def query_lens(self) -> list[int]:
        return [q for q, _ in self.lens]

    @property
    def key_lens(self) -> list[int]:
        return [k for _, k in self.lens]


@dataclass(frozen=True)
class Batch:
    """Random inputs of a case and what should come out, in float64."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cache: torch.Tensor
    tables: torch.Tensor
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    masks: list[torch.Tensor] | None
    expected: torch.Tensor
    expected_lse: torch.Tensor


def reference(
    shape: Shape,
    rules: Rules,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence in float64: (queries, Hq, D) and (queries, Hq)."""
    group = shape.num_heads // shape.num_kv_heads
    k = (keys.double() * rules.k_scale).repeat_interleave(group, 1)
    v = (values.double() * rules.v_scale).repeat_interleave(group, 1)
    s = torch.einsum("qhd,khd->hqk", query.double(), k) * shape.scale
    if rules.soft_cap is not None:
        s = rules.soft_cap * torch.tanh(s / rules.soft_cap)
    i = torch.arange(len(query), device=query.device)[:, None] + len(keys) - len(query)
    j = torch.arange(len(keys), device=query.device)[None]
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (i - j).abs()
    seen = torch.ones(len(query), len(keys), dtype=torch.bool, device=query.device)
    if mask is not None:
        seen = mask
    elif rules.causal:
        seen = j <= i
    if rules.sliding_window is not None:
        seen = seen & ((i - j if rules.causal else (i - j).abs()) < rules.sliding_window)
    s = s.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        s = torch.cat((s, sinks.double()[:, None, None].expand(-1, len(query), 1)), 2)
    weights = torch.softmax(s, 2).nan_to_num(0.0)[:, :, : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, v), torch.logsumexp(s, 2).T


def draw(shape: Shape, rules: Rules, seed: int = 0) -> Batch:
    """Inputs in a cache of shuffled blocks; unused slots are NaN, so is block 0, with which tables are padded."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    query = normal(sum(shape.query_lens), shape.num_heads, shape.head_size).to(shape.dtype)
    stored = shape.cache_dtype or shape.dtype
    keys, values = (normal(sum(shape.key_lens), shape.num_kv_heads, shape.head_size).to(stored) for _ in range(2))
    used = [-(-n // shape.block_size) for n in shape.key_lens]
    num_blocks = sum(used) + 2
    order = (1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed))).tolist()
    tables = torch.zeros(len(used), max(used) + 1, dtype=torch.int32)
    dims = (num_blocks, 2, shape.block_size, shape.num_kv_heads, shape.head_size)
    cache = torch.full(dims, float("nan"), device=DEVICE).to(stored)
    raw = cache.view(torch.uint8) if stored == FP8 else cache
    for n, (k, v) in enumerate(zip(keys.split(shape.key_lens), values.split(shape.key_lens), strict=True)):
        blocks = [order.pop() for _ in range(used[n])]
        tables[n, : used[n]] = torch.tensor(blocks, dtype=torch.int32)
        for i in range(shape.key_lens[n]):
            block, offset = blocks[i // shape.block_size], i % shape.block_size
            raw[block, 0, offset] = k[i].view(raw.dtype)
            raw[block, 1, offset] = v[i].view(raw.dtype)
    slopes = torch.rand(shape.num_heads, generator=generator, device=DEVICE) * 0.3 if rules.alibi else None
    sinks = normal(shape.num_heads) * 2 if rules.sinks else None
    masks = None
    if rules.custom:
        masks = [torch.rand(q, k, generator=generator, device=DEVICE) < 0.5 for q, k in shape.lens]
    parts = [
        reference(shape, rules, q, k, v, slopes, sinks, masks[n] if masks else None)
        for n, (q, k, v) in enumerate(
            zip(
                query.split(shape.query_lens),
                keys.float().split(shape.key_lens),
                values.float().split(shape.key_lens),
                strict=True,
            )
        )
    ]
    expected, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return Batch(query, keys, values, cache, tables.to(DEVICE), slopes, sinks, masks, expected, lse)


def starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=DEVICE)


def poisoned(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.full_like(batch.query, float("nan"))
    return output, torch.full(batch.query.shape[:2], float("nan"), device=DEVICE)


def assert_close(shape: Shape, batch: Batch, output: torch.Tensor, lse: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[shape.dtype]
    torch.testing.assert_close(output.double(), batch.expected, rtol=tolerance, atol=tolerance)
    lse_tolerance = max(1e-5, tolerance / 4)
    torch.testing.assert_close(lse.double(), batch.expected_lse, rtol=lse_tolerance, atol=lse_tolerance)


def run_paged_prefill(shape: Shape, rules: Rules) -> None:
    batch = draw(shape, rules)
    output, lse = poisoned(batch)
    mask = offsets = None
    if batch.masks is not None:
        mask = torch.cat([m.flatten() for m in batch.masks])
        offsets = starts([m.numel() for m in batch.masks])[:-1].long()
    paged_prefill(
        batch.query,
        batch.cache,
        starts(shape.query_lens),
        torch.tensor(shape.key_lens, dtype=torch.int32, device=DEVICE),
        batch.tables,
        max(shape.query_lens),
        output,
        scale=shape.scale,
        causal=rules.causal,
        sliding_window=rules.sliding_window,
        soft_cap=rules.soft_cap,
        alibi_slopes=batch.slopes,
        sinks=batch.sinks,
        k_scale=rules.k_scale,
        v_scale=rules.v_scale,
        lse=lse,
        mask=mask,
        mask_offsets=offsets,
    )
    assert_close(shape, batch, output, lse)


def run_varlen_prefill(shape: Shape, rules: Rules) -> None:
    batch = draw(shape, rules)
    output, lse = poisoned(batch)
    # keys lie inside a wider projection, followed by tokens that belong to nobody
    fused = torch.full((len(batch.keys) + 3, 2, shape.num_kv_heads, shape.head_size), float("nan"), device=DEVICE)
    fused = fused.to(shape.dtype)
    fused[: len(batch.keys), 0] = batch.keys
    varlen_prefill(
        batch.query,
        fused[:, 0],
        torch.cat((batch.values, fused[len(batch.keys) :, 0])),
        starts(shape.query_lens),
        starts(shape.key_lens),
        max(shape.query_lens),
        output,
        scale=shape.scale,
        causal=rules.causal,
        sliding_window=rules.sliding_window,
        soft_cap=rules.soft_cap,
        alibi_slopes=batch.slopes,
        sinks=batch.sinks,
        lse=lse,
    )
    assert_close(shape, batch, output, lse)


def run_decode(shape: Shape, rules: Rules, num_splits: int | None) -> None:
    batch = draw(shape, rules)
    output, lse = poisoned(batch)
    paged_decode(
        batch.query,
        batch.cache,
        batch.tables,
        torch.tensor(shape.key_lens, dtype=torch.int32, device=DEVICE),
        max(shape.key_lens),
        output,
        scale=shape.scale,
        sliding_window=rules.sliding_window,
        soft_cap=rules.soft_cap,
        alibi_slopes=batch.slopes,
        sinks=batch.sinks,
        k_scale=rules.k_scale,
        v_scale=rules.v_scale,
        lse=lse,
        num_splits=num_splits,
    )
    assert_close(shape, batch, output, lse)


CHUNKS = Shape(((5, 37), (1, 16), (20, 20), (3, 66)))
CROSS = Shape(((9, 4), (17, 33), (1, 1), (6, 16)))
DECODES = Shape(((1, 1), (1, 16), (1, 45), (1, 70)))
FEATURES = {
    "plain": Rules(),
    "window": Rules(sliding_window=11),
    "wide_window": Rules(sliding_window=40),
    "soft_cap": Rules(soft_cap=1.5),
    "alibi": Rules(alibi=True),
    "sinks": Rules(sinks=True),
    "scales": Rules(k_scale=0.3, v_scale=2.5),
    "all": Rules(sliding_window=23, soft_cap=2.0, alibi=True, sinks=True, k_scale=1.7, v_scale=0.4),
}
TYPES = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp8_fp32": (torch.float32, FP8),
    "fp8_fp16": (torch.float16, FP8),
    "fp8_bf16": (torch.bfloat16, FP8),
}
SIZES = {
    "mha": {"num_heads": 3, "num_kv_heads": 3},
    "mqa": {"num_heads": 5, "num_kv_heads": 1},
    "group_over_16": {"num_heads": 20, "num_kv_heads": 1},
    "head_48": {"head_size": 48},
    "head_80": {"head_size": 80},
    "head_192": {"head_size": 192},
    "block_1": {"block_size": 1},
    "block_4": {"block_size": 4},
    "block_64": {"block_size": 64},
}


@pytest.mark.parametrize("name", FEATURES)
def test_paged_prefill_features(name: str) -> None:
    run_paged_prefill(CHUNKS, FEATURES[name])


@pytest.mark.parametrize("rules", [Rules(), Rules(sliding_window=7), Rules(soft_cap=2.0, alibi=True, sinks=True)])
def test_paged_prefill_not_causal(rules: Rules) -> None:
    run_paged_prefill(CROSS, replace(rules, causal=False))


@pytest.mark.parametrize("rules", [Rules(), Rules(sliding_window=20, alibi=True)])
def test_paged_prefill_custom_mask(rules: Rules) -> None:
    run_paged_prefill(replace(CHUNKS, num_kv_heads=4), replace(rules, custom=True))


@pytest.mark.parametrize("name", TYPES)
def test_paged_prefill_dtypes(name: str) -> None:
    dtype, cache_dtype = TYPES[name]
    run_paged_prefill(replace(CHUNKS, dtype=dtype, cache_dtype=cache_dtype), Rules(k_scale=0.5))


@pytest.mark.parametrize("name", SIZES)
def test_paged_prefill_sizes(name: str) -> None:
    run_paged_prefill(replace(CHUNKS, **SIZES[name]), Rules())


@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_varlen_prefill_features(name: str) -> None:
    run_varlen_prefill(CHUNKS, replace(FEATURES[name], k_scale=1.0, v_scale=1.0))


@pytest.mark.parametrize("window", [None, 5])
def test_varlen_prefill_not_causal(window: int | None) -> None:
    run_varlen_prefill(CROSS, Rules(causal=False, sliding_window=window))


def test_varlen_prefill_causal_queries_before_every_key_give_zeros() -> None:
    run_varlen_prefill(CROSS, Rules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_prefill_dtypes(dtype: torch.dtype) -> None:
    run_varlen_prefill(replace(CHUNKS, dtype=dtype, head_size=80), Rules())


@pytest.mark.parametrize("num_splits", slow_unless((3).__eq__, [1, 3]))
@pytest.mark.parametrize("name", FEATURES)
def test_decode_features(name: str, num_splits: int) -> None:
    run_decode(DECODES, FEATURES[name], num_splits)


@pytest.mark.parametrize("name", TYPES)
def test_decode_dtypes(name: str) -> None:
    dtype, cache_dtype = TYPES[name]
    run_decode(replace(DECODES, dtype=dtype, cache_dtype=cache_dtype), Rules(k_scale=0.5), 2)


@pytest.mark.parametrize("name", SIZES)
def test_decode_sizes(name: str) -> None:
    run_decode(replace(DECODES, **SIZES[name]), Rules(), 2)


def test_decode_chooses_splits_itself() -> None:
    run_decode(DECODES, Rules(), None)


@pytest.mark.parametrize(
    ("num_splits", "sinks"), slow_unless(lambda v: v[1], [(1, False), (4, False), (1, True), (4, True)])
)
def test_decode_of_no_keys_gives_zeros(num_splits: int, sinks: bool) -> None:
    shape = Shape(((1, 0), (1, 21), (1, 0)))
    run_decode(shape, Rules(sinks=sinks), num_splits)


def test_more_splits_than_tiles() -> None:
    run_decode(replace(DECODES, block_size=32), Rules(sliding_window=30), MAX_SPLITS)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("num_splits", [1, 5, None])
def test_a_captured_decode_follows_lengths(num_splits: int | None) -> None:
    shape = Shape(((1, 200), (1, 333), (1, 64)), dtype=torch.bfloat16, head_size=128)
    batch = draw(shape, Rules())
    output, lse = poisoned(batch)
    lens = torch.zeros(3, dtype=torch.int32, device=DEVICE)

    def decode() -> None:
        paged_decode(
            batch.query,
            batch.cache,
            batch.tables,
            lens,
            4096,
            output,
            scale=shape.scale,
            lse=lse,
            num_splits=num_splits,
        )

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    graph.replay()
    assert torch.equal(output, torch.zeros_like(output))
    lens.copy_(torch.tensor(shape.key_lens))
    graph.replay()
    assert_close(shape, batch, output, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(2, 32), (3, 80)])
def test_reshape_and_cache_writes_slots_and_nothing_else(dtype: torch.dtype, heads: int, size: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(3)
    fused = torch.randn(7, 3, heads, size, generator=generator, device=DEVICE).to(dtype)
    key, value = fused[:, 1], fused[:, 2]
    cache = torch.randn(4, 2, 8, heads, size, generator=generator, device=DEVICE).to(dtype)
    slots = torch.tensor([31, 0, -1, 9, 8, 17, -1], device=DEVICE)
    expected = cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 8, 0, slot % 8] = key[token]
            expected[slot // 8, 1, slot % 8] = value[token]
    reshape_and_cache(key, value, cache, slots)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reshape_and_cache_scales_and_clamps_fp8(dtype: torch.dtype) -> None:
    key = torch.tensor([0.0, 1.0, -3.3, 223.9, 500.0, -1e4, 1e-3, 0.0061], device=DEVICE).repeat(4).view(1, 1, 32)
    key = torch.cat((key, -key)).to(dtype)
    value = torch.randn(2, 1, 32, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).to(dtype) * 9
    cache = torch.zeros(2, 2, 4, 1, 32, device=DEVICE).to(FP8)
    reshape_and_cache(key, value, cache, torch.tensor([5, 2], device=DEVICE), k_scale=0.5, v_scale=3.0)
    got = cache.float()
    for token, (block, offset) in enumerate([(1, 1), (0, 2)]):
        for half, (x, scale) in enumerate([(key, 0.5), (value, 3.0)]):
            stored = (x[token].float() / scale).clamp(-448, 448).to(FP8).float()
            torch.testing.assert_close(got[block, half, offset], stored, rtol=0, atol=0)
    assert got.count_nonzero() == key.count_nonzero() + value.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [32, 80])
def test_merging_two_halves_gives_the_whole(dtype: torch.dtype, size: int) -> None:
    shape = Shape(((6, 40),), num_heads=3, num_kv_heads=3, head_size=size, dtype=dtype)
    batch = draw(shape, Rules(causal=False))
    cut = 13
    halves = [
        reference(shape, Rules(causal=False), batch.query, batch.keys[part], batch.values[part], None, None, None)
        for part in (slice(cut), slice(cut, None))
    ]
    (a, a_lse), (b, b_lse) = [(out.to(dtype), lse.float().contiguous()) for out, lse in halves]
    output, lse = poisoned(batch)
    merge_attn_states(output, a, a_lse, b, b_lse, output_lse=lse)
    assert_close(shape, batch, output, lse)
    merge_attn_states(a, a, a_lse, b, b_lse)
    assert torch.equal(a, output)


def test_merging_ignores_a_side_that_saw_nothing() -> None:
    nothing = torch.full((2, 3), float("-inf"), device=DEVICE)
    something = torch.randn(2, 3, device=DEVICE)
    garbage = torch.full((2, 3, 32), float("nan"), device=DEVICE)
    x = torch.randn(2, 3, 32, device=DEVICE)
    output, lse = torch.empty_like(x), torch.empty_like(something)
    merge_attn_states(output, x, something, garbage, nothing, output_lse=lse)
    assert torch.equal(output, x)
    torch.testing.assert_close(lse, something)
    merge_attn_states(output, garbage, nothing, x, something)
    assert torch.equal(output, x)
    merge_attn_states(output, garbage, nothing, garbage, nothing, output_lse=lse)
    assert torch.equal(output, torch.zeros_like(x))
    assert torch.equal(lse, nothing)


def test_splits_fill_the_device_and_stay_in_bounds() -> None:
    tile = Tile(16, 64, 4, 3)
    assert choose_splits(64 * 8, 64, tile, H200).count == 1  # nothing to split
    assert choose_splits(64 * 8, 4096, tile, H200).count == 1  # enough programs
    assert choose_splits(8, 32768, tile, H200).count * 8 >= H200.num_sms
    ragged = choose_splits(64 * 8, 131072, tile, H200)
    assert ragged.wanted == 1
    assert ragged.count * ragged.most_tiles * tile.keys >= 131072
    for programs, length in itertools.product((1, 7, 512, 100_000), (0, 1, 190, 4096, 1_000_000)):
        splits = choose_splits(programs, length, tile, H200)
        assert 1 <= splits.wanted <= splits.count <= MAX_SPLITS


@pytest.mark.parametrize("splits", [Splits(5, 1, 2), Splits(2, 1, 2), Splits(3, 2, 3)])
def test_long_sequences_are_split_further_than_short_ones(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.ops.triton.decode.choose_splits", lambda *_: splits)
    run_decode(Shape(((1, 3), (1, 90), (1, 150), (1, 0))), Rules(), None)


@pytest.mark.parametrize("itemsize", [(2, 2), (2, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shared_memory", [48 << 10, 99 << 10, 227 << 10])
def test_tiles_fit_the_shared_memory(itemsize: tuple[int, int], head_size: int, shared_memory: int) -> None:
    traits = replace(H200, shared_memory=shared_memory)
    tiles = [
        prefill_tile(rows, groups, head_size, *itemsize, False, traits)
        for rows in (4, 512, 16384)
        for groups in (8, 64)
    ]
    for tile in (*tiles, decode_tile(16, head_size, *itemsize, traits)):
        assert tile.rows >= 16
        assert tile.keys >= 16
        assert 2 * tile.num_stages * tile.keys * head_size * itemsize[0] <= shared_memory


def test_few_queries_get_smaller_tiles() -> None:
    rows = [prefill_tile(n, 8, 128, 2, 2, False, H200).rows for n in (4, 2048, 1_000_000)]
    assert rows == sorted(set(rows))


def test_wrong_arguments_are_refused_with_the_value() -> None:
    batch = draw(DECODES, Rules())
    lens = torch.tensor(DECODES.key_lens, dtype=torch.int32, device=DEVICE)
    output = torch.empty_like(batch.query)

    def decode(query: torch.Tensor = batch.query, cache: torch.Tensor = batch.cache, **changes: object) -> None:
        paged_decode(query, cache, batch.tables, lens, 70, output, **{"scale": 1.0, **changes})  # type: ignore[arg-type]

    with pytest.raises(AttentionInputError, match="soft cap -1"):
        decode(soft_cap=-1.0)
    with pytest.raises(AttentionInputError, match="window holds at least 1 token, not 0"):
        decode(sliding_window=0)
    with pytest.raises(AttentionInputError, match="scale 0"):
        decode(scale=0.0)
    with pytest.raises(AttentionInputError, match="num_splits 65"):
        decode(num_splits=65)
    with pytest.raises(AttentionInputError, match="float64"):
        decode(query=batch.query.double())
    with pytest.raises(AttentionInputError, match="4 query heads do not divide among 3"):
        decode(cache=torch.zeros(3, 2, 16, 3, 32, device=DEVICE))
    with pytest.raises(AttentionInputError, match="block size 12 is not a power of two"):
        decode(cache=torch.zeros(3, 2, 12, 2, 32, device=DEVICE))


def test_a_mask_comes_with_its_offsets_and_cannot_be_too_large() -> None:
    batch = draw(CHUNKS, Rules())
    starts_q, lens = starts(CHUNKS.query_lens), torch.tensor(CHUNKS.key_lens, dtype=torch.int32, device=DEVICE)
    mask = torch.ones(1, dtype=torch.bool, device=DEVICE).expand(1 << 32)
    offsets = torch.zeros(len(lens), dtype=torch.int64, device=DEVICE)
    output = torch.empty_like(batch.query)
    common = (batch.query, batch.cache, starts_q, lens)
    with pytest.raises(AttentionInputError, match="come together"):
        paged_prefill(*common, batch.tables, 20, output, scale=1.0, mask=mask)
    with pytest.raises(AttentionInputError, match="at most 2147483647"):
        paged_prefill(*common, batch.tables, 1 << 30, output, scale=1.0, mask=mask, mask_offsets=offsets)
