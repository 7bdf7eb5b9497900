"""Every backend against attention written out in float64."""

from __future__ import annotations

import random

import pytest
import torch

from attention.backend import AttentionMetadata, AttentionSpec
from attention.kv_cache import KVCacheSpec
from attention.metadata import build_metadata
from attention.registry import PRIORITY, get_backend

# (query tokens, tokens in all) of each sequence.
BATCHES = {
    "prefill": [(1, 1), (5, 5), (16, 16), (17, 17), (64, 64), (130, 130)],
    "chunk": [(3, 20), (16, 32), (33, 64), (2, 129), (47, 48)],
    "decode": [(1, 1), (1, 2), (1, 16), (1, 17), (1, 33), (1, 64), (1, 65), (1, 200), (1, 190), (1, 31)],
    "decode_even": [(1, 40)] * 4,
    "decode_one": [(1, 77)],
    "mixed": [(1, 33), (20, 20), (1, 150), (7, 40), (1, 1), (64, 128), (1, 64)],
}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
HEAD_SIZE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """(n, Hq, D) against (S, Hkv, D), in float64, the queries being the last n of the S tokens."""
    num_queries, num_keys = q.shape[0], k.shape[0]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    for i in range(num_queries):
        position = num_keys - num_queries + i
        for j in range(num_keys):
            if j > position or (window is not None and position - j >= window):
                scores[:, i, j] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


class Case:
    """A batch over a cache whose unused slots are NaN, and what attention should give."""

    def __init__(
        self,
        lens: list[tuple[int, int]],
        heads: tuple[int, int],
        dtype: torch.dtype,
        block_size: int,
        window: int | None,
    ) -> None:
        generator = torch.Generator().manual_seed(len(lens) + block_size)
        self.spec = AttentionSpec(heads[0], heads[1], HEAD_SIZE, HEAD_SIZE**-0.5, window)
        needed = [-(-context // block_size) for _, context in lens]
        blocks = list(range(sum(needed) + 3))
        random.Random(block_size).shuffle(blocks)
        cache = KVCacheSpec(2, heads[1], HEAD_SIZE, block_size, dtype).allocate(len(blocks), "cpu")
        self.layer = cache.fill_(float("nan"))[1]
        tables = [[blocks.pop() for _ in range(n)] for n in needed]
        queries, keys, values, expected = [], [], [], []
        for (query_len, context), table in zip(lens, tables, strict=True):
            q = torch.randn(query_len, heads[0], HEAD_SIZE, generator=generator).to(dtype)
            k, v = torch.randn(2, context, heads[1], HEAD_SIZE, generator=generator).to(dtype).unbind(0)
            for position in range(context - query_len):
                self.layer[table[position // block_size], :, position % block_size] = torch.stack(
                    (k[position], v[position])
                )
            queries.append(q)
            keys.append(k[context - query_len :])
            values.append(v[context - query_len :])
            expected.append(reference(q, k, v, self.spec.scale, window))
        self.query, self.key, self.value = torch.cat(queries), torch.cat(keys), torch.cat(values)
        self.expected = torch.cat(expected)
        self.metadata: AttentionMetadata = build_metadata(
            [q for q, _ in lens], [c for _, c in lens], tables, block_size
        )


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", PRIORITY["cpu"])
def test_matches_float64_reference(
    name: str, lens: list[tuple[int, int]], dtype: torch.dtype, heads: tuple[int, int], window: int | None
) -> None:
    backend = get_backend(name)
    block_size = {"mha": 16, "gqa": 32, "mqa": 64}[next(k for k, v in HEADS.items() if v == heads)]
    case = Case(lens, heads, dtype, block_size, window)
    impl = backend.impl_class(case.spec)
    plan = backend.plan(case.spec, case.metadata, block_size)
    poisoned = torch.full_like(case.query, float("nan"))
    returned = impl.forward(case.query, case.key, case.value, case.layer, case.metadata, plan)
    written = impl.forward(case.query, case.key, case.value, case.layer, case.metadata, plan, poisoned)
    assert written.data_ptr() == poisoned.data_ptr()
    assert returned.dtype == dtype
    assert returned.shape == case.query.shape
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(returned.double(), case.expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(written, returned, rtol=0, atol=0)


@pytest.mark.parametrize("block_size", [1, 16, 32, 64])
@pytest.mark.parametrize("name", PRIORITY["cpu"])
def test_block_sizes(name: str, block_size: int) -> None:
    backend = get_backend(name)
    case = Case(BATCHES["mixed"], HEADS["gqa"], torch.float32, block_size, 50)
    impl = backend.impl_class(case.spec)
    plan = backend.plan(case.spec, case.metadata, block_size)
    out = impl.forward(case.query, case.key, case.value, case.layer, case.metadata, plan)
    torch.testing.assert_close(out.double(), case.expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lens", [[(600, 600)], [(300, 700)]], ids=["whole", "chunk"])
@pytest.mark.parametrize("window", [None, 100])
def test_long_prompts_are_split_into_tiles(lens: list[tuple[int, int]], window: int | None) -> None:
    backend = get_backend("CPU_ATTN")
    case = Case(lens, (2, 1), torch.float32, 16, window)
    plan = backend.plan(case.spec, case.metadata, 16)
    out = backend.impl_class(case.spec).forward(case.query, case.key, case.value, case.layer, case.metadata, plan)
    torch.testing.assert_close(out.double(), case.expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PRIORITY["cpu"])
def test_a_cut_in_a_strided_projection_is_accepted(name: str) -> None:
    """Queries, keys and values are often views of one fused projection."""
    backend = get_backend(name)
    case = Case(BATCHES["mixed"], HEADS["gqa"], torch.float32, 16, None)
    fused = torch.cat((case.query, case.key, case.value), dim=1)
    query, key, value = fused.split((6, 2, 2), dim=1)
    plan = backend.plan(case.spec, case.metadata, 16)
    out = backend.impl_class(case.spec).forward(query, key, value, case.layer, case.metadata, plan)
    torch.testing.assert_close(out.double(), case.expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PRIORITY["cpu"])
def test_new_tokens_are_stored_and_nothing_else_is_touched(name: str) -> None:
    backend = get_backend(name)
    case = Case([(4, 20), (1, 7)], HEADS["gqa"], torch.float32, 16, None)
    before = case.layer.clone()
    plan = backend.plan(case.spec, case.metadata, 16)
    backend.impl_class(case.spec).forward(case.query, case.key, case.value, case.layer, case.metadata, plan)
    for token, slot in enumerate(case.metadata.slot_mapping.tolist()):
        block, offset = divmod(slot, 16)
        assert torch.equal(case.layer[block, 0, offset], case.key[token])
        assert torch.equal(case.layer[block, 1, offset], case.value[token])
        before[block, :, offset] = case.layer[block, :, offset]
    torch.testing.assert_close(case.layer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", PRIORITY["cpu"])
def test_float16(name: str) -> None:
    backend = get_backend(name)
    case = Case(BATCHES["mixed"], HEADS["gqa"], torch.float16, 16, 24)
    plan = backend.plan(case.spec, case.metadata, 16)
    out = backend.impl_class(case.spec).forward(case.query, case.key, case.value, case.layer, case.metadata, plan)
    torch.testing.assert_close(out.double(), case.expected, rtol=5e-3, atol=5e-3)
