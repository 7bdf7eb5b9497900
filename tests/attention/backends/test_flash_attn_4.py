"""FA4 is launched with little Python, and gives the same: what is replayed, what is not, and where keys are read."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import fake_flash_attn
from attention.backends import flash_attn
from attention.backends.flash_attn import FlashAttnImpl, FlashAttnMetadataBuilder, fa4, trial
from attention.backends.flash_attn.calls import Call
from attention.backends.flash_attn.gathering import should_gather
from attention.backends.flash_attn.versions import PROVIDERS, FlashAttnVersion, force_flash_attn_version
from attention.kv_cache import KVCacheSpec, reshape_and_cache
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.platform import Platform
from attention.selection.reference import reference_attention
from attention.selection.registry import get_backend
from attention.spec import AttentionNeeds, AttentionSpec, AttentionType
from attention_reference import attend, visible_keys

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=16, scale=0.25)
HOPPER = next(p for p in PROVIDERS if p.version is FlashAttnVersion.FA4 and p.low == (9, 0))
WINDOW, CAP, SINKS = (
    replace(SPEC, **change) for change in ({"sliding_window": 9}, {"logits_soft_cap": 3.0}, {"has_sinks": True})
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """flash_attn.cute.interface, as of 4.0.0b36."""
    made = fake_flash_attn.flash_attn_4()
    monkeypatch.setattr(fa4, "load_library", lambda *_: made)
    return made


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    yield
    for cached in (fa4.launcher_of, trial.kernel_fault, trial.compile_kernels):
        cached.cache_clear()


def run(call: Call) -> torch.Tensor:
    """Run a call into an output full of NaN."""
    call.output.fill_(float("nan"))
    fa4.flash_attn_4(False, call)
    return call.output.clone()


def layer(spec: AttentionSpec, page: tuple[int, int] | None = None, seed: int = 0) -> Call:
    """A small call with other numbers for every seed."""
    call = trial.small_call(spec, torch.float32, CPU, page)
    noise = torch.randn(call.query.shape, generator=torch.Generator().manual_seed(seed))
    return replace(call, query=call.query + noise)


def expected(spec: AttentionSpec, call: Call) -> torch.Tensor:
    lens = call.cu_seqlens_q.diff().tolist()
    pieces = []
    for i, (query, begin) in enumerate(zip(call.query.split(lens), call.cu_seqlens_k.tolist(), strict=False)):
        keys, values = (t[begin : begin + lens[i]] for t in (call.key, call.value))
        if call.block_tables is not None:
            pages = call.block_tables[i].long()
            keys, values = (t[pages].flatten(0, 1)[: lens[i]] for t in (call.key, call.value))
        pieces.append(reference_attention(spec, query, keys, values, call.sinks))
    return torch.cat(pieces)


@pytest.mark.parametrize("page", [None, (16, 16), (16, 64)], ids=["packed", "pages", "pages-cut-from-blocks"])
@pytest.mark.parametrize("spec", [SPEC, WINDOW, CAP, SINKS], ids=["plain", "window", "cap", "sinks"])
def test_later_calls_go_straight_to_the_kernel_and_read_their_own_tensors(
    spec: AttentionSpec, page: tuple[int, int] | None, library: ModuleType
) -> None:
    for seed in range(3):
        call = layer(spec, page, seed)
        torch.testing.assert_close(run(call), expected(spec, call), rtol=1e-5, atol=1e-5)
    assert library.forwards == 1
    (kernel,) = library.kernels.values()
    assert kernel.launches == 3


def test_what_the_library_may_tell_apart_is_not_replayed_for_one_another(library: ModuleType) -> None:
    plain = layer(SPEC)
    longer = replace(plain, max_seq_len=plain.max_seq_len + 1)
    scaled = replace(plain, scale=0.125)
    copied = replace(plain, cu_seqlens_k=plain.cu_seqlens_k.clone())  # not the queries' own tensor any more
    strided = replace(plain, query=plain.query.transpose(0, 1).contiguous().transpose(0, 1))
    for number, call in enumerate((plain, layer(WINDOW), layer(CAP), longer, scaled, copied, strided), 1):
        run(call)
        assert library.forwards == number
    run(plain)
    assert library.forwards == 7


def test_offsets_of_keys_are_not_taken_for_those_of_queries(library: ModuleType) -> None:
    """A fresh batch has one tensor for both; another, alike in every shape, has keys of other lengths than queries."""
    cross = replace(SPEC, attn_type=AttentionType.ENCODER_DECODER)
    keys, queries = (torch.tensor(begins, dtype=torch.int32) for begins in ([0, 6, 12], [0, 4, 12]))
    small = trial.small_call(cross, torch.float32, CPU)
    query, key, value, output = (t[:12] for t in (small.query, small.key, small.value, small.output))
    both = replace(small, query=query, key=key, value=value, output=output, cu_seqlens_q=keys, cu_seqlens_k=keys)
    run(both)
    found = run(replace(both, cu_seqlens_q=queries))
    pieces = zip(query.split([4, 8]), key.split([6, 6]), value.split([6, 6]), strict=True)
    wanted = torch.cat([attend(q, k, v, cross, visible_keys(cross, len(q), 6)) for q, k, v in pieces])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_short_prompts_need_no_kernel_of_their_own(library: ModuleType) -> None:
    run(replace(layer(SPEC), max_query_len=5))
    run(layer(SPEC))
    assert len(library.kernels) == 1


def test_logarithms_of_denominators_come_from_replays_too(library: ModuleType) -> None:
    call = replace(layer(SPEC), wants_lse=True)
    first, second = (fa4.flash_attn_4(False, call) for _ in range(2))
    assert first is not None
    assert first.shape == (8, len(call.query))
    assert torch.equal(first, second)
    assert library.forwards == 1


def test_an_output_that_kernels_cannot_write_to_is_copied_to(library: ModuleType) -> None:
    call = layer(SPEC)
    crooked = torch.empty(call.output.numel() + 1)[1:].view_as(call.output)
    for _ in range(2):
        torch.testing.assert_close(run(replace(call, output=crooked)), expected(SPEC, call), rtol=1e-5, atol=1e-5)
    assert library.forwards == 2, "its tensor is not the call's, so nothing can be replayed"


class Vanished:
    """What a version without the function behind the public one, or with another one, could look like."""

    @staticmethod
    def nothing_behind(library: ModuleType) -> None:
        delattr(library, fa4.INNER)

    @staticmethod
    def no_output(library: ModuleType) -> None:
        setattr(library, fa4.INNER, lambda q, k, v, softmax_scale=None: pytest.fail("called"))

    @staticmethod
    def no_cache(library: ModuleType) -> None:
        inner = _by_public(library)
        setattr(library, fa4.INNER, inner)
        assert not hasattr(inner, "compile_cache")

    @staticmethod
    def a_cache_that_is_replaced(library: ModuleType) -> None:
        fa4.launcher_of(library)
        getattr(library, fa4.INNER).compile_cache = {}

    @staticmethod
    def tensors_of_its_own(library: ModuleType) -> None:
        inner = getattr(library, fa4.INNER)

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs["cu_seqlens_q"] = kwargs["cu_seqlens_q"].clone()
            return inner(*args, **kwargs)

        forward.__signature__ = inner.__signature__  # type: ignore[attr-defined]
        forward.compile_cache = inner.compile_cache  # type: ignore[attr-defined]
        setattr(library, fa4.INNER, forward)


def _by_public(library: ModuleType) -> Any:
    """The function behind, of a version that keeps its kernels somewhere else."""
    inner = getattr(library, fa4.INNER)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    forward.__signature__ = inner.__signature__  # type: ignore[attr-defined]
    return forward


@pytest.mark.parametrize(
    "change",
    [
        Vanished.nothing_behind,
        Vanished.no_output,
        Vanished.no_cache,
        Vanished.a_cache_that_is_replaced,
        Vanished.tensors_of_its_own,
    ],
    ids=lambda change: change.__name__,
)
def test_another_version_of_the_library_is_called_as_a_whole(change: Any, library: ModuleType) -> None:
    change(library)
    for seed in range(3):
        call = layer(SPEC, seed=seed)
        torch.testing.assert_close(run(call), expected(SPEC, call), rtol=1e-5, atol=1e-5)


def test_gradients_are_the_public_functions(library: ModuleType) -> None:
    call = layer(SPEC)
    with torch.no_grad():
        run(replace(call, query=call.query.clone().requires_grad_()))
    assert library.forwards == 0


def test_a_trial_finds_kernels_that_raise_or_are_wrong(library: ModuleType) -> None:
    kernel = functools.partial(fa4.flash_attn_4, False)
    assert trial.kernel_fault(kernel, CPU) is None

    def fails(call: Call) -> None:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    def forgets(call: Call) -> None:
        kernel(call)
        call.output[-1] = 0.0

    assert trial.kernel_fault(fails, CPU) == "RuntimeError: no kernel image is available for execution on the device"
    assert str(trial.kernel_fault(forgets, CPU)).startswith("wrong numbers: off by")
    assert "off by nan" in str(trial.kernel_fault(lambda call: None, CPU))


def test_kernels_are_compiled_for_packed_keys_and_for_pages(library: ModuleType) -> None:
    kernel = functools.partial(fa4.flash_attn_4, False)
    for _ in range(2):
        trial.compile_kernels(kernel, SINKS, torch.float32, (16, 64), CPU)
    assert library.forwards == 2
    assert len(library.kernels) == 2


def prefix_batch(query_len: int, prefix: int, block_size: int = 16) -> CommonAttentionMetadata:
    blocks = list(range(1, -(-(query_len + prefix) // block_size) + 1))
    return build_metadata([query_len], [query_len + prefix], [blocks], block_size)


class TestGathering:
    """Of a Llama layer: four query heads read each key."""

    LAYER = AttentionSpec(32, 8, 128, 128**-0.5)

    def gathers(self, query_len: int, prefix: int, spec: AttentionSpec = LAYER) -> bool:
        return should_gather(8192, prefix_batch(query_len, prefix), spec, torch.bfloat16)

    def test_it_pays_for_many_queries(self) -> None:
        assert self.gathers(2048, 8192)
        assert not self.gathers(2047, 8192)
        assert not should_gather(None, prefix_batch(4096, 8192), self.LAYER, torch.bfloat16)

    def test_groups_read_a_key_together(self) -> None:
        assert self.gathers(1024, 8192, replace(self.LAYER, num_kv_heads=4))
        assert not self.gathers(4096, 4096, replace(self.LAYER, num_kv_heads=32))

    def test_a_window_hides_most_keys(self) -> None:
        assert not self.gathers(2048, 8192, replace(self.LAYER, sliding_window=1024))

    def test_its_memory_is_bounded(self) -> None:
        assert self.gathers(4096, 61_440)
        assert not self.gathers(4096, 61_441)

    @pytest.mark.parametrize("gather_from", [None, 100, 10**9])
    def test_either_way_gives_the_same(
        self, gather_from: int | None, library: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        provider = replace(HOPPER, kernel=functools.partial(fa4.flash_attn_4, False), gather_from=gather_from)
        monkeypatch.setattr(flash_attn, "choose_provider", lambda *_, **__: provider)
        monkeypatch.setattr(flash_attn.PagedAttention, "write_to_paged_cache", staticmethod(reshape_and_cache))
        common = prefix_batch(37, 100)
        torch.manual_seed(0)
        query, key, value = torch.randn(37, 8, 16), torch.randn(37, 2, 16), torch.randn(37, 2, 16)
        cache = KVCacheSpec((0,), 2, 16, 16, torch.float32).allocate(12, "cpu")[0]
        cache[1:10].copy_(torch.randn(9, 2, 16, 2, 16))
        builder = FlashAttnMetadataBuilder(SPEC, torch.float32, 16, CPU)
        metadata = builder.build(common)
        assert (metadata.rows is not None) == (gather_from == 100)
        output = FlashAttnImpl(SPEC).forward(query, key, value, cache, metadata)
        keys, values = (cache[1:10, half].flatten(0, 1)[:137] for half in (0, 1))
        wanted = reference_attention(SPEC, query, keys, values)
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


LENS = ((700, 700), (300, 1500), (1, 77), (129, 257))
"""Whole prompts and chunks, longer than a tile on either side."""
FEATURES = {
    "plain": {},
    "one head a group": {"num_kv_heads": 8},
    "one group": {"num_kv_heads": 1},
    "window": {"sliding_window": 200},
    "long window": {"sliding_window": 1000},
    "cap": {"logits_soft_cap": 5.0},
    "sinks": {"has_sinks": True},
    "sinks, window": {"has_sinks": True, "sliding_window": 128},
    "heads of 64": {"head_size": 64, "scale": 0.125},
    "heads of 256": {"head_size": 256, "scale": 0.0625},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """Against float64. Every feature is compiled: some seconds each."""

    LAYER = AttentionSpec(8, 2, 128, 128**-0.5)

    def _builder(self, spec: AttentionSpec, block_size: int, **change: Any) -> FlashAttnMetadataBuilder:
        with force_flash_attn_version(4):
            refused = get_backend("FLASH_ATTN").refuse(
                Platform.of("cuda"), AttentionNeeds(spec, torch.bfloat16, block_size)
            )
            if refused:
                pytest.skip("; ".join(refused))
            builder = FlashAttnMetadataBuilder(spec, torch.bfloat16, block_size, torch.device("cuda"))
        builder.provider = replace(builder.provider, **change)
        return builder

    @pytest.mark.parametrize("change", FEATURES.values(), ids=FEATURES)
    @pytest.mark.parametrize("gather_from", [None, 0], ids=["pages", "gathered"])
    def test_chunks_of_all_features(self, change: dict[str, Any], gather_from: int | None) -> None:
        spec = replace(self.LAYER, **change)
        builder = self._builder(spec, 64, gather_from=gather_from)
        self._check(builder, spec, LENS, 64)

    @pytest.mark.parametrize("change", [FEATURES["plain"], FEATURES["sinks, window"]], ids=["plain", "sinks, window"])
    def test_whole_prompts(self, change: dict[str, Any]) -> None:
        spec = replace(self.LAYER, **change)
        self._check(self._builder(spec, 64), spec, ((500, 500), (33, 33), (1, 1), (1030, 1030)), 64)

    @pytest.mark.parametrize("block_size", [16, 128])
    def test_blocks_of_other_sizes(self, block_size: int) -> None:
        self._check(self._builder(self.LAYER, block_size, gather_from=None), self.LAYER, LENS, block_size)

    def test_whole_pages_are_read_as_tiles(self) -> None:
        """Pages of 128 are loaded as they are; nothing but numbers may lie behind a sequence's last key then."""
        builder = self._builder(self.LAYER, 128, gather_from=None, stale_rows=False)
        self._check(builder, self.LAYER, LENS, 128, unused=0.0)

    def test_more_sequences_than_the_scheduler_looks_through(self) -> None:
        lens = tuple((1 + i % 3, 1 + i % 3 + 16 * (i % 5)) for i in range(300))
        self._check(self._builder(self.LAYER, 16), self.LAYER, lens, 16)

    def test_a_captured_prompt_reads_what_is_there_when_it_is_replayed(self) -> None:
        builder = self._builder(self.LAYER, 64)
        lens = ((320, 320),)
        common, query, key, value, cache = self._inputs(self.LAYER, lens, 64)
        impl, output = FlashAttnImpl(self.LAYER), torch.empty_like(query)
        impl.forward(query, key, value, cache, builder.build(common), output)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            impl.forward(query, key, value, cache, builder.build(common), output)
        for tensor in (query, key, value):
            tensor.copy_(torch.randn_like(tensor))
        output.fill_(float("nan"))
        graph.replay()
        wanted = attend(query, key, value, self.LAYER, visible_keys(self.LAYER, 320, 320, query.device))
        assert ((output.double() - wanted).norm() / wanted.norm()).item() < 0.012

    def test_most_calls_need_no_library(self) -> None:
        """This version is watched: a layer's second call does not reach the library's own function."""
        builder = self._builder(self.LAYER, 64)
        common, query, key, value, cache = self._inputs(self.LAYER, ((320, 320),), 64)
        plan = builder.build(common)
        library = importlib.import_module(fa4.MODULE)
        launcher, seen = fa4.launcher_of(library), []
        inner = launcher.inner
        launcher.inner = lambda *args, **kwargs: (seen.append(1), inner(*args, **kwargs))[1]
        try:
            for _ in range(4):
                FlashAttnImpl(self.LAYER).forward(query, key, value, cache, plan, torch.empty_like(query))
        finally:
            launcher.inner = inner
        assert len(seen) <= 1

    def _inputs(
        self, spec: AttentionSpec, lens: tuple[tuple[int, int], ...], block_size: int, unused: float = float("nan")
    ) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch over shuffled blocks, whose cache holds `unused` wherever no earlier token is."""
        torch.manual_seed(0)
        used = [-(-keys // block_size) for _, keys in lens]
        pack = torch.randperm(sum(used)).tolist()
        tables = [[pack.pop() for _ in range(n)] for n in used]
        common = build_metadata([q for q, _ in lens], [k for _, k in lens], tables, block_size, "cuda")
        shape = (sum(used), 2, block_size, spec.num_kv_heads, spec.head_size)
        cache = torch.full(shape, unused, device="cuda", dtype=torch.bfloat16)
        for (queries, keys), table in zip(lens, tables, strict=True):
            for position in range(0, keys - queries, block_size):
                rows = min(block_size, keys - queries - position)
                part = cache[table[position // block_size], :, :rows]
                part.copy_(torch.randn(part.shape, device="cuda"))
        tokens = sum(q for q, _ in lens)
        heads = spec.num_heads + 2 * spec.num_kv_heads
        projected = torch.randn(tokens, heads, spec.head_size, device="cuda").to(torch.bfloat16)
        query, key, value = projected.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        return common, query, key, value, cache

    def _check(
        self,
        builder: FlashAttnMetadataBuilder,
        spec: AttentionSpec,
        lens: tuple[tuple[int, int], ...],
        block_size: int,
        unused: float = float("nan"),
    ) -> None:
        common, query, key, value, cache = self._inputs(spec, lens, block_size, unused)
        sinks = torch.randn(spec.num_heads, device="cuda") if spec.has_sinks else None
        impl, plan = FlashAttnImpl(spec, sinks), builder.build(common)
        output = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
        impl.forward(query, key, value, cache, plan, output)
        again = impl.forward(query, key, value, cache, plan, torch.full_like(output, float("nan")))
        assert torch.equal(output, again)
        wanted = []
        for i, (q, (_, keys)) in enumerate(zip(query.split(list(common.query_lens)), lens, strict=True)):
            blocks = common.block_tables[i, : -(-keys // block_size)].long()
            k, v = (cache[blocks, half].flatten(0, 1)[:keys] for half in (0, 1))
            wanted.append(attend(q, k, v, spec, visible_keys(spec, len(q), keys, q.device), sinks))
        expected = torch.cat(wanted)
        assert ((output.double() - expected).norm() / expected.norm()).item() < 0.012
