"""The conformance suite itself: that its reference is right, and that its checks find what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attention.backend import KVScales
from attention.spec import AttentionSpec, AttentionType
from attention_batches import CHUNK, Batches
from attention_cases import Case
from attention_checks import check_cache, check_output
from attention_inputs import LAYER, draw
from attention_matrix import cases
from attention_reference import attend, fp8_round_trip, visible_keys

CASE = Case(CHUNK, torch.float32, num_heads=4, num_kv_heads=2, head_size=32)
FP8_CASE = replace(CASE, fp8=KVScales(0.013, 0.021))


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, sinks: torch.Tensor
) -> torch.Tensor:
    """The last query's attention, head by head and key by key, as the layer's description says it."""
    last, group = k.shape[0] - 1, spec.num_heads // spec.num_kv_heads
    out = torch.zeros(q.shape[1:], dtype=torch.float64)
    for head in range(spec.num_heads):
        total = math.exp(sinks[head])
        for j in range(last + 1):
            if spec.sliding_window is not None and last - j >= spec.sliding_window:
                continue
            score = spec.scale * torch.dot(q[-1, head].double(), k[j, head // group].double()).item()
            if spec.logits_soft_cap is not None:
                score = spec.logits_soft_cap * math.tanh(score / spec.logits_soft_cap)
            if spec.alibi_slopes is not None:
                score -= spec.alibi_slopes[head] * abs(last - j)
            total += math.exp(score)
            out[head] += math.exp(score) * v[j, head // group].double()
        out[head] /= total
    return out


def test_the_reference_does_what_the_layer_is_described_to_do() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, generator=generator) for n, h in ((3, 4), (20, 2), (20, 2)))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    spec = AttentionSpec(4, 2, 8, 0.3, 7, logits_soft_cap=1.5, alibi_slopes=(0.5, 0.1, 0.3, 0.0), has_sinks=True)
    out = attend(q, k, v, spec, visible_keys(spec, 3, 20), sinks)
    torch.testing.assert_close(out[-1], by_hand(q, k, v, spec, sinks), rtol=1e-12, atol=1e-12)


def test_visible_keys() -> None:
    def rows(spec: AttentionSpec, queries: int, keys: int, tree: torch.Tensor | None = None) -> list[str]:
        seen = visible_keys(spec, queries, keys, tree_mask=tree)
        return ["".join(".x"[int(sees)] for sees in row) for row in seen]

    decoder = AttentionSpec(1, 1, 8, 1.0)
    encoder = replace(decoder, attn_type=AttentionType.ENCODER_ONLY)
    cross = replace(decoder, attn_type=AttentionType.ENCODER_DECODER)
    assert rows(decoder, 2, 4) == ["xxx.", "xxxx"]
    assert rows(replace(decoder, sliding_window=2), 2, 4) == [".xx.", "..xx"]
    assert rows(encoder, 3, 3) == ["xxx"] * 3
    assert rows(replace(encoder, sliding_window=2), 4, 4) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert rows(cross, 3, 2) == ["xx"] * 3
    assert rows(decoder, 2, 4, torch.eye(2, dtype=torch.bool)) == ["xxx.", "xx.x"]


def test_fp8_round_trip_clamps_and_rounds() -> None:
    given = torch.tensor([1.0, 1.07, -500.0, 500.0, 0.0])
    assert fp8_round_trip(given, 1.0).tolist() == [1.0, 1.125, -448.0, 448.0, 0.0]
    assert fp8_round_trip(given, 2.0).tolist() == [1.0, 1.125, -256.0 * 2, 256.0 * 2, 0.0]


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    inputs = draw(replace(CASE, batch=Batches().custom[0], mask="custom"), "cpu")
    nothing = (inputs.expected == 0).all(-1).all(-1)
    assert nothing[[2, 7, 23]].all()  # the third row of every sequence
    assert not nothing[[0, 5, 21]].any()
    assert torch.isfinite(inputs.expected).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out[3].fill_(float("nan")),
        lambda out: out[3, 1].mul_(1.0001),
        lambda out: out.mul_(1.00002),
        lambda out: out[:2].copy_(out[:2].flip(0)),
        lambda out: out[0].copy_(out[0].flip(0)),
    ],
    ids=["nan", "one head", "all a little", "tokens swapped", "heads swapped"],
)
def test_a_wrong_output_is_found(spoil: Callable[[torch.Tensor], object]) -> None:
    expected = draw(CASE, "cpu").expected
    output = expected.float()
    check_output(output, expected)
    spoil(output)
    with pytest.raises(AssertionError):
        check_output(output, expected)


def test_something_where_nothing_is_seen_is_found() -> None:
    expected = torch.ones(2, 1, 8, dtype=torch.float64)
    expected[1] = 0
    output = expected.float()
    output[1] = 1e-9
    with pytest.raises(AssertionError, match="zeros"):
        check_output(output, expected)


@pytest.mark.parametrize("case", [CASE, FP8_CASE], ids=["fp32", "fp8"])
def test_a_byte_out_of_place_in_the_cache_is_found(case: Case) -> None:
    inputs = draw(case, "cpu")
    after = inputs.cache_after()
    assert after is not None
    assert inputs.cache is not None
    with pytest.raises(AssertionError):  # nothing was stored
        check_cache(inputs, after)
    inputs.cache.copy_(after)
    check_cache(inputs, after)
    block, offset = divmod(int(inputs.common.slot_mapping[0]), case.block_size)
    for place in ((LAYER, block, 1, offset), (1 - LAYER, block, 1, offset), (LAYER, block - 1, 0, offset)):
        spoiled = replace(inputs, cache=after.clone())
        assert spoiled.cache is not None
        spoiled.cache[place].view(torch.uint8)[0, 0] ^= 0x3C
        with pytest.raises(AssertionError):
            check_cache(spoiled, after)


def test_fp8_numbers_may_be_rounded_to_a_neighbour_but_only_some() -> None:
    inputs = draw(FP8_CASE, "cpu")
    after = inputs.cache_after()
    assert after is not None
    block, offset = divmod(int(inputs.common.slot_mapping[0]), FP8_CASE.block_size)
    one = after.clone()
    one[LAYER, block, 0, offset].view(torch.uint8)[0, 0] += 1
    check_cache(replace(inputs, cache=one), after)
    many = after.clone()
    for slot in inputs.common.slot_mapping.tolist()[:20]:
        many[LAYER, slot // FP8_CASE.block_size, :, slot % FP8_CASE.block_size].view(torch.uint8).add_(1)
    with pytest.raises(AssertionError, match="rounded otherwise"):
        check_cache(replace(inputs, cache=many), after)


@pytest.mark.parametrize("axes", ["cpu", "cuda", "interpreted"])
def test_cases_are_sound(axes: str) -> None:
    found = cases(axes)
    assert len({case.id for case in found}) == len(found)
    for case in found:
        assert not case.spec.faults()
        assert case.common_prefix % case.block_size == 0
