"""The operator under torch.compile, the connector's two hooks around it, and what a context must hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from attention.backend import KVScales
from attention.errors import AttentionInputError
from attention.forward_context import ForwardContext, forward_context
from attention.fp8 import FP8_MAX
from attention.kv_cache import KVCacheSpec
from attention.layers.attention import Attention
from attention.metadata import build_metadata
from attention.selection.registry import get_backend
from attention.spec import FP8, AttentionSpec

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 16, 16
SPEC = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE**-0.5)


class TwoLayers(nn.Module):
    """A projection and attention, twice: enough for a graph with operators on both sides of attention."""

    def __init__(self, spec: AttentionSpec = SPEC, backend: str = "CPU_ATTN") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attentions = nn.ModuleList(Attention(spec, get_backend(backend), f"layers.{i}") for i in range(2))
        self.projections = nn.ModuleList(
            nn.Linear(HEADS * SIZE, (HEADS + 2 * KV_HEADS) * SIZE, bias=False) for _ in range(2)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for projection, attention in zip(self.projections, self.attentions, strict=True):
            qkv = projection(hidden).view(-1, HEADS + 2 * KV_HEADS, SIZE)
            query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            hidden = hidden + attention(query, key, value).flatten(1)
        return hidden

    def context(
        self,
        lens: list[tuple[int, int]],
        caches: list[torch.Tensor],
        wait: Callable[[str], None] | None = None,
        save: Callable[[str], None] | None = None,
    ) -> ForwardContext:
        tables, used = [], 0
        for _, context_len in lens:
            blocks = -(-context_len // BLOCK)
            tables.append(list(range(used, used + blocks)))
            used += blocks
        common = build_metadata([q for q, _ in lens], [c for _, c in lens], tables, BLOCK)
        spec = self.attentions[0].spec
        built = self.attentions[0].backend.builder_class(spec, torch.float32, BLOCK, torch.device("cpu")).build(common)
        layers = {attention.name: attention for attention in self.attentions}
        return ForwardContext(layers, dict.fromkeys(layers, built), dict(zip(layers, caches, strict=True)), wait, save)


def make_caches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(KVCacheSpec((0, 1), KV_HEADS, SIZE, BLOCK, dtype).allocate(8, "cpu").unbind(0))


@torch.inference_mode()
def test_a_compiled_model_gives_what_the_plain_one_gives() -> None:
    model = TwoLayers()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain_caches, compiled_caches = make_caches(), make_caches()
    for lens in ([(5, 5), (20, 20)], [(1, 6), (1, 21)], [(3, 9), (1, 22)]):
        hidden = torch.randn(sum(q for q, _ in lens), HEADS * SIZE)
        with forward_context(model.context(lens, plain_caches)):
            expected = model(hidden)
        with forward_context(model.context(lens, compiled_caches)):
            found = compiled(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for plain, other in zip(plain_caches, compiled_caches, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_operator_keeps_pytorchs_rules() -> None:
    model = TwoLayers()
    query, key = torch.randn(5, HEADS, SIZE), torch.randn(5, KV_HEADS, SIZE)
    with forward_context(model.context([(5, 5)], make_caches())):
        torch.library.opcheck(
            torch.ops.baton.unified_attention.default,
            (query, key, key.clone(), torch.empty_like(query), "layers.0"),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("compile_model", [False, True])
@torch.inference_mode()
def test_the_hooks_are_around_each_layer(compile_model: bool) -> None:
    """KV is waited for before the layer reads it, and complete in the cache when the layer is announced."""
    model, caches = TwoLayers(), make_caches()
    events: list[tuple[str, str, bool]] = []

    def stored(name: str) -> bool:
        return bool(caches[int(name[-1])][0, :, :5].abs().sum(dim=(2, 3)).ne(0).all())

    context = model.context(
        [(5, 5)],
        caches,
        wait=lambda name: events.append(("wait", name, stored(name))),
        save=lambda name: events.append(("save", name, stored(name))),
    )
    run = torch.compile(model, fullgraph=True, backend="eager") if compile_model else model
    with forward_context(context):
        run(torch.randn(5, HEADS * SIZE))
    assert events == [
        ("wait", "layers.0", False),
        ("save", "layers.0", True),
        ("wait", "layers.1", False),
        ("save", "layers.1", True),
    ]


def test_outside_a_context_there_is_a_clear_error() -> None:
    with pytest.raises(AttentionInputError, match="forward_context"):
        TwoLayers()(torch.randn(2, HEADS * SIZE))


def test_a_missing_batch_or_cache_is_named() -> None:
    model = TwoLayers()
    context = model.context([(2, 2)], make_caches())
    without_batch = ForwardContext(context.layers, {}, context.kv_caches)
    without_cache = ForwardContext(context.layers, context.metadata, {})
    with forward_context(without_batch), pytest.raises(AttentionInputError, match=r"no batch for layer layers\.0"):
        model(torch.randn(2, HEADS * SIZE))
    with forward_context(without_cache), pytest.raises(AttentionInputError, match=r"no KV cache for layer layers\.0"):
        model(torch.randn(2, HEADS * SIZE))


@torch.inference_mode()
def test_fp8_scales_are_found_from_the_first_tokens_and_then_kept() -> None:
    spec = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE**-0.5, kv_cache_dtype=FP8)
    model, caches = TwoLayers(spec), make_caches(FP8)
    attention = model.attentions[0]
    query, key = torch.randn(5, HEADS, SIZE), torch.randn(5, KV_HEADS, SIZE) * 1000
    with forward_context(model.context([(5, 5)], caches)):
        attention(query, key, key * 2)
    expected = KVScales(float(key.abs().max()) / FP8_MAX, float(key.abs().max()) * 2 / FP8_MAX)
    assert (attention.impl.kv_scales.k, attention.impl.kv_scales.v) == pytest.approx((expected.k, expected.v))
    kept = attention.impl.kv_scales
    with forward_context(model.context([(1, 6)], caches)):
        attention(query[:1], key[:1] * 3, key[:1])
    assert attention.impl.kv_scales == kept


@torch.inference_mode()
def test_given_fp8_scales_are_used() -> None:
    spec = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE**-0.5, kv_cache_dtype=FP8)
    attention = Attention(spec, get_backend("CPU_ATTN"), "layers.0", kv_scales=KVScales(2.0, 4.0))
    caches = make_caches(FP8)
    model = TwoLayers(spec)
    built = model.context([(3, 3)], caches)
    context = ForwardContext({"layers.0": attention}, built.metadata, built.kv_caches)
    key = torch.full((3, KV_HEADS, SIZE), 8.0)
    with forward_context(context):
        attention(torch.randn(3, HEADS, SIZE), key, key)
    stored = caches[0][0].float()
    assert stored[0, :3].unique().tolist() == [4.0]
    assert stored[1, :3].unique().tolist() == [2.0]
