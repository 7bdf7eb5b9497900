"""`PagedAttention` and `merge_attn_states`, in plain torch and in Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from attention.backend import KVScales
from attention.errors import AttentionInputError
from attention.ops.dispatch import uses_triton
from attention.ops.merge_attn_states import apply_sinks, merge_attn_states, merge_states
from attention.ops.paged_attention import PARTITION_SIZE, PagedAttention
from attention.ops.torch_attention import Scores
from attention.spec import FP8, AttentionSpec
from attention_reference import attend, fp8_round_trip, visible_keys
from paged_case import shuffled_tables

HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 24, 16
SCALE = 0.3
SLOPES = tuple(0.5**i for i in range(1, HEADS + 1))
SPEC = AttentionSpec(HEADS, KV_HEADS, SIZE, SCALE)
SPECS = {
    "plain": SPEC,
    "window": replace(SPEC, sliding_window=70),
    "alibi": replace(SPEC, alibi_slopes=SLOPES),
    "cap": replace(SPEC, logits_soft_cap=2.0),
    "sinks": replace(SPEC, has_sinks=True),
    "fp8": replace(SPEC, kv_cache_dtype=FP8),
    "all": AttentionSpec(
        HEADS,
        KV_HEADS,
        SIZE,
        SCALE,
        sliding_window=700,
        logits_soft_cap=2.0,
        alibi_slopes=SLOPES,
        has_sinks=True,
        kv_cache_dtype=FP8,
    ),
}
DECODE_LENS = {"torch": (1, 511, 512, 513, 1100, 16, 33), "triton": (530, 17, 1)}
"""Interpreted kernels are slow: what they compute is tested with them, here only that they are called right."""
MATRIX = [("torch", name) for name in SPECS] + [("triton", name) for name in ("plain", "all")]


@pytest.fixture(params=["torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the operations of a test in plain torch, and again as Triton kernels."""
    triton = request.param == "triton"
    if triton and not uses_triton(torch.empty(0)):
        pytest.skip("needs TRITON_INTERPRET=1")
    for module in ("paged_attention", "merge_attn_states"):
        monkeypatch.setattr(f"attention.ops.{module}.uses_triton", lambda _tensor: triton)
    return str(request.param)


@dataclass(frozen=True)
class Paged:
    """A cache, NaN wherever no token is, what is asked of it, and float64's answers."""

    query: torch.Tensor
    cache: torch.Tensor
    tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    scores: Scores
    sinks: torch.Tensor | None
    scales: KVScales
    expected: torch.Tensor
    expected_lse: torch.Tensor


def paged(spec: AttentionSpec, lens: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Paged:
    """Sequences of (queries, keys), in shuffled blocks."""
    generator = torch.Generator().manual_seed(len(lens))
    fp8 = spec.kv_cache_dtype == FP8
    scales = KVScales(0.01, 0.02) if fp8 else KVScales()
    blocks = shuffled_tables([keys for _, keys in lens], BLOCK)
    tables = torch.zeros(len(lens), max(map(len, blocks)), dtype=torch.int32)
    cache = torch.full((sum(map(len, blocks)) + 2, 2, BLOCK, KV_HEADS, SIZE), float("nan"), dtype=dtype)
    cache = cache.to(FP8) if fp8 else cache
    sinks = torch.randn(HEADS, generator=generator) if spec.has_sinks else None
    queries, outputs, lses = [], [], []
    for i, (n, s) in enumerate(lens):
        tables[i, : len(blocks[i])] = torch.tensor(blocks[i])
        q = torch.randn(n, HEADS, SIZE, generator=generator).to(dtype)
        k, v = torch.randn(2, s, KV_HEADS, SIZE, generator=generator).to(dtype)
        slots = torch.tensor(blocks[i])[torch.arange(s) // BLOCK] * BLOCK + torch.arange(s) % BLOCK
        PagedAttention.write_to_paged_cache(k, v, cache, slots, scales)
        if fp8:
            k, v = fp8_round_trip(k, scales.k), fp8_round_trip(v, scales.v)
        seen = visible_keys(spec, n, s)
        queries.append(q)
        outputs.append(attend(q, k, v, spec, seen, sinks))
        lses.append(denominators(q, k, spec, seen, sinks))
    return Paged(
        query=torch.cat(queries),
        cache=cache,
        tables=tables,
        cu_seqlens_q=torch.tensor([0, *(n for n, _ in lens)]).cumsum(0).int(),
        seq_lens=torch.tensor([s for _, s in lens], dtype=torch.int32),
        scores=Scores(
            spec.scale,
            sliding_window=spec.sliding_window,
            soft_cap=spec.logits_soft_cap,
            alibi_slopes=torch.tensor(spec.alibi_slopes) if spec.alibi_slopes else None,
        ),
        sinks=sinks,
        scales=scales,
        expected=torch.cat(outputs),
        expected_lse=torch.cat(lses),
    )


def denominators(
    query: torch.Tensor, key: torch.Tensor, spec: AttentionSpec, seen: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """(n, Hq) float64: logarithms of the softmaxes' denominators, one query and one head after the other."""
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float64)
    for i in range(query.shape[0]):
        position = key.shape[0] - query.shape[0] + i
        keys = seen[i].nonzero().flatten()
        for head in range(spec.num_heads):
            of_head = key[keys, head // (spec.num_heads // spec.num_kv_heads)].double()
            logits = of_head @ query[i, head].double() * spec.scale
            if spec.logits_soft_cap is not None:
                logits = spec.logits_soft_cap * (logits / spec.logits_soft_cap).tanh()
            if spec.alibi_slopes is not None:
                logits = logits - spec.alibi_slopes[head] * (position - keys).abs()
            if sinks is not None:
                logits = torch.cat((logits, sinks[head].double().view(1)))
            lse[i, head] = logits.logsumexp(0)
    return lse


def decode(case: Paged, version: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Into poisoned buffers."""
    output, lse = torch.full_like(case.query, float("nan")), torch.full(case.query.shape[:2], float("nan"))
    returned = PagedAttention.forward_decode(
        case.query,
        case.cache,
        case.tables,
        case.seq_lens,
        int(case.seq_lens.max()),
        case.scores,
        sinks=case.sinks,
        scales=case.scales,
        output=output,
        lse=lse,
        version=version,
    )
    assert returned is output
    return output, lse


def assert_right(case: Paged, output: torch.Tensor, lse: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(output.double(), case.expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), case.expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("way", "name"), MATRIX, indirect=["way"])
def test_one_pass_partitions_and_float64_agree_in_decode(way: str, name: str) -> None:
    case = paged(SPECS[name], [(1, keys) for keys in DECODE_LENS[way]])
    one_pass, partitioned = decode(case, 1), decode(case, 2)
    assert_right(case, *one_pass)
    assert_right(case, *partitioned)


@pytest.mark.parametrize(("way", "name"), MATRIX, indirect=["way"])
@pytest.mark.usefixtures("way")
def test_prefix_matches_float64(name: str) -> None:
    case = paged(SPECS[name], [(3, 20), (40, 40), (1, 33), (20, 100)])
    lse = torch.full(case.query.shape[:2], float("nan"))
    output = PagedAttention.forward_prefix(
        case.query,
        case.cache,
        case.tables,
        case.cu_seqlens_q,
        case.seq_lens,
        40,
        case.scores,
        sinks=case.sinks,
        scales=case.scales,
        lse=lse,
    )
    assert_right(case, output, lse)


@pytest.mark.parametrize("window", [None, 300])
def test_long_prefixes_are_cut_into_tiles_of_queries_and_keys(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.ops.paged_attention.uses_triton", lambda _tensor: False)
    case = paged(replace(SPEC, sliding_window=window), [(300, 1300), (129, 129)])
    output = PagedAttention.forward_prefix(
        case.query, case.cache, case.tables, case.cu_seqlens_q, case.seq_lens, 300, case.scores
    )
    torch.testing.assert_close(output.double(), case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.ops.paged_attention.uses_triton", lambda _tensor: False)
    case = paged(SPEC, [(1, keys) for keys in DECODE_LENS["torch"]], dtype)
    for version in (1, 2):
        output, lse = decode(case, version)
        assert output.dtype == dtype
        assert_right(case, output, lse, tolerance=1e-2 if dtype is torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.usefixtures("way")
def test_a_sequence_without_keys_gives_zeros(version: int) -> None:
    case = paged(SPEC, [(1, 40), (1, 5)])
    case.seq_lens[1] = 0
    output, lse = decode(case, version)
    assert not output[1].any()
    assert (lse[1] == float("-inf")).all()
    torch.testing.assert_close(output[0].double(), case.expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_an_empty_batch_is_no_work() -> None:
    case = paged(SPEC, [(1, 5)])
    nothing = PagedAttention.forward_decode(
        case.query[:0], case.cache, case.tables[:0], case.seq_lens[:0], 0, case.scores
    )
    assert nothing.shape == (0, HEADS, SIZE)


@pytest.mark.parametrize(
    ("max_seq_len", "num_seqs", "num_heads", "v1"),
    [
        (1, 1, 1, True),
        (PARTITION_SIZE, 1, 1, True),  # one partition
        (PARTITION_SIZE + 1, 1, 32, False),
        (8192, 16, 32, False),  # 512 is not more than 512
        (8192, 17, 32, True),
        (8193, 1000, 32, False),
    ],
)
def test_the_choice_between_versions_is_vllms(max_seq_len: int, num_seqs: int, num_heads: int, v1: bool) -> None:
    assert PagedAttention.use_v1(max_seq_len, num_seqs, num_heads) is v1


@pytest.mark.parametrize(("num_seqs", "partitioned"), [(1, True), (86, False)])
def test_decode_obeys_the_choice(num_seqs: int, partitioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("attention.ops.paged_attention.uses_triton", lambda _tensor: False)
    monkeypatch.setattr(
        "attention.ops.torch_attention.paged_decode", lambda *_args, **kwargs: asked.append(kwargs["partitioned"])
    )
    query = torch.zeros(num_seqs, HEADS, SIZE)
    lens = torch.full((num_seqs,), 600, dtype=torch.int32)
    cache, tables = torch.zeros(1, 2, BLOCK, KV_HEADS, SIZE), torch.zeros(num_seqs, 38, dtype=torch.int32)
    PagedAttention.forward_decode(query, cache, tables, lens, 600, Scores(SCALE))
    assert asked == [partitioned]


def test_there_is_no_third_version() -> None:
    case = paged(SPEC, [(1, 5)])
    with pytest.raises(AttentionInputError, match="versions 1 and 2, not 3"):
        decode(case, 3)


@pytest.mark.usefixtures("way")
def test_writing_touches_its_slots_alone() -> None:
    cache = torch.full((4, 2, BLOCK, KV_HEADS, SIZE), float("nan"))
    fused = torch.randn(3, 2 * KV_HEADS, SIZE)
    key, value = fused.split(KV_HEADS, dim=1)  # cuts of one projection
    slots = torch.tensor([3 * BLOCK, BLOCK + 5, BLOCK - 1])
    PagedAttention.write_to_paged_cache(key, value, cache, slots)
    assert PagedAttention.get_kv_cache_shape(4, BLOCK, KV_HEADS, SIZE) == cache.shape
    for i, (block, offset) in enumerate([(3, 0), (1, 5), (0, BLOCK - 1)]):
        assert torch.equal(cache[block, 0, offset], key[i])
        assert torch.equal(cache[block, 1, offset], value[i])
        cache[block, :, offset] = float("nan")
    assert cache.isnan().all()


@pytest.mark.usefixtures("way")
def test_merging_two_halves_gives_the_whole() -> None:
    torch.manual_seed(0)
    logits, values = torch.randn(4, HEADS, 50, dtype=torch.float64) * 3, torch.randn(50, SIZE, dtype=torch.float64)
    halves = [
        ((part.softmax(-1) @ values[keys]).float(), part.logsumexp(-1).float())
        for part, keys in ((logits[..., :20], slice(0, 20)), (logits[..., 20:], slice(20, 50)))
    ]
    output, lse = torch.full((4, HEADS, SIZE), float("nan")), torch.full((4, HEADS), float("nan"))
    merge_attn_states(output, *halves[0], *halves[1], output_lse=lse)
    torch.testing.assert_close(output.double(), logits.softmax(-1) @ values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_a_side_that_saw_nothing_is_not_read() -> None:
    empty, nothing = torch.full((2, HEADS, SIZE), float("nan")), torch.full((2, HEADS), float("-inf"))
    some, lse = torch.randn(2, HEADS, SIZE), torch.randn(2, HEADS)
    output, output_lse = torch.empty_like(some), torch.empty_like(lse)
    for sides in ((some, lse, empty, nothing), (empty, nothing, some, lse)):
        merge_attn_states(output, *sides, output_lse=output_lse)
        torch.testing.assert_close(output, some)
        torch.testing.assert_close(output_lse, lse)
    merge_attn_states(output, empty, nothing, empty, nothing, output_lse=output_lse)
    assert not output.any()
    assert (output_lse == float("-inf")).all()


@pytest.mark.usefixtures("way")
def test_the_output_of_a_merge_may_be_one_of_its_inputs() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, HEADS, SIZE)
    a_lse, b_lse = torch.randn(2, 5, HEADS) * 20
    apart = torch.empty_like(a)
    merge_attn_states(apart, a, a_lse, b, b_lse)
    merge_attn_states(a, a, a_lse, b, b_lse, output_lse=a_lse)
    torch.testing.assert_close(a, apart)


def test_states_that_do_not_belong_together_are_refused() -> None:
    a, lse = torch.zeros(2, HEADS, SIZE), torch.zeros(2, HEADS)
    with pytest.raises(AttentionInputError, match="cannot merge"):
        merge_attn_states(a, a, lse, a[:1], lse)
    with pytest.raises(AttentionInputError, match="cannot merge"):
        merge_attn_states(a, a, lse.T, a, lse)


def test_many_states_merge_as_two_by_two() -> None:
    torch.manual_seed(0)
    outputs, lses = torch.randn(5, 3, HEADS, SIZE), torch.randn(5, 3, HEADS) * 30
    lses[2] = lses[:, 1, 0] = float("-inf")
    together, together_lse = merge_states(outputs, lses)
    one, one_lse = outputs[0], lses[0]
    for output, lse in zip(outputs[1:], lses[1:], strict=True):
        one, one_lse = merge_states(torch.stack((one, output)), torch.stack((one_lse, lse)))
    torch.testing.assert_close(together, one)
    torch.testing.assert_close(together_lse, one_lse)
    assert not together[1, 0].any()


def test_a_sink_is_one_logit_more() -> None:
    torch.manual_seed(0)
    logits, values = torch.randn(3, HEADS, 9), torch.randn(9, SIZE)
    sinks = torch.randn(HEADS)
    output, lse = apply_sinks(logits.softmax(-1) @ values, logits.logsumexp(-1), sinks)
    column = sinks.expand(3, -1)[..., None]
    weights = torch.cat((logits, column), dim=-1).softmax(-1)[..., :-1]
    torch.testing.assert_close(output, weights @ values)
    torch.testing.assert_close(lse, torch.cat((logits, column), dim=-1).logsumexp(-1))
