"""FLASHINFER, FLASH_ATTN and XFORMERS: what they refuse, which kernel they choose, how they tell it what to do.

Whether the answers are right is for the conformance suite on a GPU; what runs on the CPU here is everything before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fake_flash_attn
from attention.backend import AttentionMetadata
from attention.backends.flash_attn import calls, fa4, key_slots, page_tables, paged_views
from attention.backends.flash_attn.calls import Call
from attention.backends.flash_attn.versions import FlashAttnVersion, choose_provider, force_flash_attn_version
from attention.backends.flashinfer import choice
from attention.backends.flashinfer.paging import common_pages, list_pages, written_out
from attention.errors import AttentionBackendError, AttentionInputError
from attention.metadata import CommonAttentionMetadata, build_metadata, cumulative_lens
from attention.platform import Platform
from attention.selection.registry import get_backend
from attention.spec import FP8, AttentionNeeds, AttentionSpec, AttentionType, Feature
from attention_reference import attend, visible_keys
from fake_flash_attn import fa2_varlen, fa3_kvcache, fa3_varlen, fa4_varlen, vllm_varlen
from fake_kernels import module

SPEC = AttentionSpec(8, 2, 128, 128**-0.5)
LENS = ((1, 33), (20, 20), (7, 40), (1, 1))
SLOPES = tuple(2.0 ** -(i + 1) for i in range(8))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def refusal(
    name: str, platform: str, spec: AttentionSpec = SPEC, dtype: torch.dtype = torch.bfloat16, *features: Feature
) -> str:
    needs = AttentionNeeds(spec, dtype, 16, features=frozenset(features))
    return "; ".join(get_backend(name).refuse(Platform.simulate(platform), needs))


def batch(
    block_size: int = 16, device: torch.device | str = "cpu", lens: tuple[tuple[int, int], ...] = LENS, **more: Any
) -> CommonAttentionMetadata:
    """A batch whose sequences' blocks are dealt from a shuffled pack; a common prefix's are those of the first."""
    used = [-(-keys // block_size) for _, keys in lens]
    pack = torch.randperm(sum(used), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[pack.pop() for _ in range(n)] for n in used]
    shared = more.get("common_prefix_len", 0) // block_size
    tables = [tables[0][:shared] + table[shared:] for table in tables]
    return build_metadata([q for q, _ in lens], [k for _, k in lens], tables, block_size, device, **more)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "platform", "reason"),
        [
            ("FLASHINFER", "sm75", "needs SM 8.0 or newer, this is SM 7.5"),
            ("FLASH_ATTN", "sm75", "needs SM 8.0 or newer, this is SM 7.5"),
            ("FLASHINFER", "cpu", "runs on cuda, not on cpu"),
            ("FLASH_ATTN", "rocm", "runs on cuda, not on rocm"),
            ("XFORMERS", "tpu", "runs on cuda, not on tpu"),
        ],
    )
    def test_hardware(self, name: str, platform: str, reason: str) -> None:
        assert reason in refusal(name, platform)

    @pytest.mark.parametrize("name", ["FLASHINFER", "FLASH_ATTN", "XFORMERS"])
    @pytest.mark.parametrize("platform", ["sm80", "sm89", "sm90", "sm100"])
    def test_plain_layers_are_accepted(self, name: str, platform: str) -> None:
        for attn_type in AttentionType:
            assert refusal(name, platform, replace(SPEC, attn_type=attn_type)) == ""

    @pytest.mark.parametrize("name", ["FLASHINFER", "FLASH_ATTN"])
    def test_single_precision(self, name: str) -> None:
        assert "float32 is none of" in refusal(name, "sm90", SPEC, torch.float32)

    def test_a_missing_library(self) -> None:
        needs = AttentionNeeds(SPEC, torch.bfloat16, 16)
        for name, package in (("FLASHINFER", "flashinfer"), ("XFORMERS", "xformers")):
            reasons = get_backend(name).refuse(Platform.simulate("sm90").without(package), needs)
            assert any("is not installed" in reason for reason in reasons)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"alibi_slopes": (0.5,) * 8}, "slopes of the paper"),
            ({"alibi_slopes": SLOPES, "logits_soft_cap": 3.0}, "caps scores after adding"),
            ({"alibi_slopes": SLOPES, "has_sinks": True}, "sinks cannot bear"),
            ({"alibi_slopes": SLOPES, "attn_type": AttentionType.ENCODER}, "keys before the query only"),
            ({"sliding_window": 9, "attn_type": AttentionType.ENCODER_ONLY}, "look back only"),
            ({"head_size": 80}, "head size 80"),
        ],
    )
    def test_flashinfer_combinations(self, change: dict[str, Any], reason: str) -> None:
        assert reason in refusal("FLASHINFER", "sm90", replace(SPEC, **change))

    def test_flashinfer_alibi_with_masks(self) -> None:
        alibi = replace(SPEC, alibi_slopes=SLOPES)
        assert refusal("FLASHINFER", "sm90", alibi) == ""
        assert "before the query only" in refusal("FLASHINFER", "sm90", alibi, torch.float16, Feature.TREE_MASK)

    @pytest.mark.parametrize("feature", [Feature.TREE_MASK, Feature.CUSTOM_MASK, Feature.CASCADE])
    @pytest.mark.parametrize("name", ["FLASH_ATTN", "XFORMERS"])
    def test_batches_that_only_some_can_run(self, name: str, feature: Feature) -> None:
        assert refusal(name, "sm90", SPEC, torch.float16, feature)
        assert refusal("FLASHINFER", "sm90", SPEC, torch.float16, feature) == ""

    def test_xformers_windows_look_back_only(self) -> None:
        window = replace(SPEC, sliding_window=9)
        assert refusal("XFORMERS", "sm80", window) == ""
        assert "look back only" in refusal("XFORMERS", "sm80", replace(window, attn_type=AttentionType.ENCODER))


class TestFlashAttnVersions:
    @pytest.mark.parametrize(
        ("platform", "change", "wanted"),
        [
            ("sm80", {}, "FA2 of flash-attn"),
            ("sm90", {}, "FA4 of flash-attn-4"),
            ("sm100", {}, "FA4 of flash-attn-4"),
            ("sm90", {"alibi_slopes": SLOPES}, "FA2 of flash-attn"),
            ("sm100", {"alibi_slopes": SLOPES}, "FA2 of flash-attn"),
            ("sm90", {"sliding_window": 1000}, "FA4 of flash-attn-4"),
            ("sm100", {"sliding_window": 1000}, "FA4 of flash-attn-4"),
            ("sm90", {"logits_soft_cap": 3.0, "has_sinks": True}, "FA4 of flash-attn-4"),
        ],
    )
    def test_best_first(self, platform: str, change: dict[str, Any], wanted: str) -> None:
        assert str(choose_provider(Platform.simulate(platform), replace(SPEC, **change))) == wanted

    @pytest.mark.parametrize(
        ("missing", "wanted"),
        [
            ((), "FA3 of flash-attn-3"),
            (("flash_attn_3",), "FA2 of flash-attn"),
            (("flash_attn_3", "flash_attn"), "FA4 of flash-attn-4"),
            (("flash_attn_3", "flash_attn", "flash_attn_4"), "FA2 of PyTorch"),
        ],
    )
    def test_decode_is_for_those_that_divide_keys_among_processors(self, missing: tuple[str, ...], wanted: str) -> None:
        hopper = Platform.simulate("sm90").without(*missing)
        assert str(choose_provider(hopper, SPEC, decode=True)) == wanted

    def test_fa3_is_given_no_windows(self) -> None:
        hopper = Platform.simulate("sm90").without("flash_attn_4")
        assert str(choose_provider(hopper, SPEC)) == "FA3 of flash-attn-3"
        assert str(choose_provider(hopper, replace(SPEC, sliding_window=1000))) == "FA2 of flash-attn"

    def test_pytorch_is_always_there(self) -> None:
        bare = Platform.simulate("sm90").without("flash_attn", "flash_attn_3", "flash_attn_4")
        assert str(choose_provider(bare, SPEC)) == "FA2 of PyTorch"
        with pytest.raises(AttentionBackendError, match="FA2 of PyTorch has no soft cap"):
            choose_provider(bare, replace(SPEC, logits_soft_cap=3.0))

    def test_forced(self) -> None:
        hopper = Platform.simulate("sm90")
        with force_flash_attn_version(2):
            assert choose_provider(hopper, SPEC).version is FlashAttnVersion.FA2
            with force_flash_attn_version(3):
                assert choose_provider(hopper, SPEC).version is FlashAttnVersion.FA3
            assert choose_provider(hopper, SPEC).version is FlashAttnVersion.FA2
        assert choose_provider(hopper, SPEC).version is FlashAttnVersion.FA4

    def test_forced_and_not_there(self) -> None:
        with force_flash_attn_version(4):
            assert "FA4 of flash-attn-4 is not made for SM 8.0" in refusal("FLASH_ATTN", "sm80")
            bare = Platform.simulate("sm90").without("flash_attn_4")
            reasons = get_backend("FLASH_ATTN").refuse(bare, AttentionNeeds(SPEC, torch.bfloat16, 16))
            assert "FlashAttention 4 is forced, and flash-attn-4 is not installed" in reasons
        with force_flash_attn_version(3):
            assert "FA3 of flash-attn-3 is not made for SM 8.0" in refusal("FLASH_ATTN", "sm80")

    def test_unknown_version(self) -> None:
        with pytest.raises(AttentionBackendError, match="version 5: one of 2, 3, 4"), force_flash_attn_version(5):
            pass

    @pytest.mark.parametrize(
        ("block_size", "head_size", "page"),
        [(16, 128, 16), (64, 128, 64), (128, 128, 32), (64, 256, 32), (100, 64, None)],
    )
    def test_fa3_pages_are_shorter_than_its_tiles(self, block_size: int, head_size: int, page: int | None) -> None:
        provider = choose_provider(Platform.simulate("sm90"), SPEC)
        assert provider.page_size(block_size, head_size) == page

    def test_fa2_reads_only_large_pages(self) -> None:
        provider = choose_provider(Platform.simulate("sm80"), SPEC)
        assert (provider.page_size(64, 128), provider.page_size(256, 128)) == (None, 256)


@pytest.mark.parametrize(("block_size", "page_size"), [(16, 16), (64, 32), (128, 32)])
def test_pages_cut_from_blocks_hold_the_same_keys(block_size: int, page_size: int) -> None:
    common = batch(block_size)
    cache = torch.randn(int(common.block_tables.max()) + 1, 2, block_size, 2, 8)
    keys, values = paged_views(cache, page_size)
    tables = page_tables(common.block_tables, block_size // page_size)
    for i, length in enumerate(common.context_lens):
        blocks = common.block_tables[i, : -(-length // block_size)].long()
        pages = tables[i, : -(-length // page_size)].long()
        for paged, half in ((keys, 0), (values, 1)):
            assert torch.equal(paged[pages].flatten(0, 1)[:length], cache[blocks, half].flatten(0, 1)[:length])


def test_key_slots_name_every_key_in_order() -> None:
    common = batch(16)
    wanted = [
        int(common.block_tables[i, position // 16]) * 16 + position % 16
        for i, length in enumerate(common.context_lens)
        for position in range(length)
    ]
    assert key_slots(common, cumulative_lens(common.context_lens), 16).tolist() == wanted


class TestFlashInferPaging:
    @pytest.mark.parametrize("skipped", [0, 1])
    def test_pages(self, skipped: int) -> None:
        lens = tuple((q, keys + 32) for q, keys in LENS)
        common = batch(16, lens=lens)
        pages = list_pages(common, 16, skipped)
        begins = pages.indptr.tolist()
        for i, (_, length) in enumerate(lens):
            used = -(-length // 16)
            assert pages.indices[begins[i] : begins[i + 1]].tolist() == common.block_tables[i, skipped:used].tolist()
            assert int(pages.last_page_len[i]) == (length - 1) % 16 + 1
        assert pages.indices.dtype == pages.indptr.dtype == pages.last_page_len.dtype == torch.int32

    def test_common_pages(self) -> None:
        common = batch(16, lens=((1, 60), (1, 40)), common_prefix_len=32)
        pages = common_pages(common, 16)
        assert pages.indices.tolist() == common.block_tables[1, :2].tolist()
        assert (pages.indptr.tolist(), pages.last_page_len.tolist()) == ([0, 2], [16])

    @pytest.mark.parametrize("window", [None, 2, 9])
    def test_trees_written_out(self, window: int | None) -> None:
        tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
        lens = ((4, 4), (4, 20), (4, 33))
        common = batch(16, lens=lens, tree_mask=tree)
        written = written_out(common, window)
        assert written is not None
        spec = replace(SPEC, sliding_window=window)
        wanted = [visible_keys(spec, q, keys, tree_mask=tree).flatten() for q, keys in lens]
        assert torch.equal(written, torch.cat(wanted))

    def test_custom_masks_stay_as_they_are(self) -> None:
        mask = torch.rand(sum(q * keys for q, keys in LENS)) < 0.5
        assert written_out(batch(16, custom_mask=mask), 3) is mask
        assert written_out(batch(16), 3) is None


class TestFlashInferChoice:
    @pytest.mark.parametrize(
        ("capability", "change", "masked", "wanted"),
        [
            ((9, 0), {}, False, "fa3"),
            ((9, 0), {"sliding_window": 9, "logits_soft_cap": 3.0, "has_sinks": True}, False, "fa3"),
            ((9, 0), {"alibi_slopes": SLOPES}, False, "fa2"),
            ((9, 0), {"kv_cache_dtype": FP8}, False, "fa2"),
            ((9, 0), {}, True, "fa2"),
            ((8, 0), {}, False, "fa2"),
            ((10, 0), {}, False, "fa2"),
        ],
    )
    def test_prefill(self, capability: tuple[int, int], change: dict[str, Any], masked: bool, wanted: str) -> None:
        assert choice.prefill_kernel(capability, replace(SPEC, **change), masked) == wanted

    @pytest.mark.parametrize(
        ("capability", "change", "block_size", "fits"),
        [
            ((9, 0), {}, 16, True),
            ((9, 0), {"sliding_window": 9, "has_sinks": True}, 128, True),
            ((9, 0), {}, 8, False),
            ((8, 0), {}, 16, False),
            ((9, 0), {"logits_soft_cap": 3.0}, 16, False),
            ((9, 0), {"alibi_slopes": SLOPES}, 16, False),
            ((9, 0), {"num_heads": 64, "num_kv_heads": 1}, 16, False),
        ],
    )
    def test_xqa(self, capability: tuple[int, int], change: dict[str, Any], block_size: int, fits: bool) -> None:
        assert choice.xqa_fits(capability, replace(SPEC, **change), block_size) is fits

    def test_cascade(self) -> None:
        many = batch(16, lens=((1, 300),) * 8, common_prefix_len=256)
        assert choice.cascade_pays(many, SPEC, xqa=False)
        assert not choice.cascade_pays(many, replace(SPEC, sliding_window=64), xqa=False)
        assert not choice.cascade_pays(many, replace(SPEC, alibi_slopes=SLOPES), xqa=False)
        assert not choice.cascade_pays(replace(many, common_prefix_len=16), SPEC, xqa=False)
        assert not choice.cascade_pays(batch(16, lens=((1, 300),) * 2, common_prefix_len=256), SPEC, xqa=False)

    @pytest.mark.parametrize(("sequences", "own", "pays"), [(64, 128, True), (16, 128, False), (64, 4096, False)])
    def test_cascade_instead_of_xqa(self, sequences: int, own: int, pays: bool) -> None:
        common = batch(64, lens=((1, 4096 + own),) * sequences, common_prefix_len=4096)
        assert choice.cascade_pays(common, SPEC, xqa=True) is pays

    def test_slopes_of_the_paper(self) -> None:
        assert choice.paper_slopes(8) == pytest.approx(SLOPES)
        assert choice.paper_slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


LIBRARIES: dict[str, tuple[Callable[[Call], torch.Tensor | None], Any]] = {
    "FA4": (functools.partial(fa4.flash_attn_4, True), module("fa4", flash_attn_varlen_func=fa4_varlen)),
    "FA4 of SM 9.0": (functools.partial(fa4.flash_attn_4, False), fake_flash_attn.flash_attn_4()),
    "FA3": (
        calls.flash_attn_3,
        SimpleNamespace(flash_attn_varlen_func=fa3_varlen, flash_attn_with_kvcache=fa3_kvcache),
    ),
    "vLLM": (functools.partial(calls.vllm_flash_attn, 3), SimpleNamespace(flash_attn_varlen_func=vllm_varlen)),
    "FA2": (calls.flash_attn_2, SimpleNamespace(flash_attn_varlen_func=fa2_varlen)),
}


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize(
    "change",
    [{}, {"sliding_window": 9}, {"logits_soft_cap": 3.0}, {"attn_type": AttentionType.ENCODER, "sliding_window": 5}],
    ids=["plain", "window", "cap", "encoder"],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_packages_are_called_as_they_are_written(
    library: str, change: dict[str, Any], paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, library_module = LIBRARIES[library]
    for where in (calls, fa4):
        monkeypatch.setattr(where, "load_library", lambda *_: library_module)
    spec = replace(SPEC, head_size=16, scale=0.25, **change)
    lens = tuple((keys, keys) for _, keys in LENS) if not spec.causal else LENS
    common = batch(16, lens=lens)
    torch.manual_seed(0)
    query = torch.randn(sum(q for q, _ in lens), 8, 16)
    keys, values = torch.randn(2, sum(k for _, k in lens), 2, 16).unbind(0)
    offsets = cumulative_lens(common.context_lens)
    pool = torch.full((int(common.block_tables.max()) + 1, 2, 16, 2, 16), float("nan"))
    slots = key_slots(common, offsets, 16)
    pool[slots // 16, 0, slots % 16], pool[slots // 16, 1, slots % 16] = keys, values
    output = torch.full_like(query, float("nan"))
    left = -1 if spec.sliding_window is None else spec.sliding_window - 1
    call = Call(
        query=query,
        key=pool[:, 0] if paged else keys,
        value=pool[:, 1] if paged else values,
        output=output,
        cu_seqlens_q=common.cu_seqlens_q,
        cu_seqlens_k=offsets,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        seq_lens=common.seq_lens,
        block_tables=common.block_tables if paged else None,
        scale=spec.scale,
        causal=spec.causal,
        window=(left, 0 if spec.causal and left >= 0 else left),
        soft_cap=spec.logits_soft_cap or 0.0,
        alibi_slopes=None,
        sinks=None,
        wants_lse=True,
    )
    lse = kernel(call)
    pieces = zip(
        lens, query.split(list(common.query_lens)), keys.split(list(common.context_lens)),
        values.split(list(common.context_lens)), strict=True,
    )  # fmt: skip
    wanted = torch.cat([attend(q, k, v, spec, visible_keys(spec, *n)) for n, q, k, v in pieces])
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-5)
    assert lse is not None
    assert lse.shape == (8, len(query))
    first = (query[0].view(2, 4, 16) @ keys[: lens[0][1]].permute(1, 2, 0)).double() * spec.scale
    if not change:
        torch.testing.assert_close(lse[:, 0].double(), first.logsumexp(-1).flatten(), rtol=1e-5, atol=1e-5)
    assert kernel(replace(call, wants_lse=False)) is None


def _reference(
    common: CommonAttentionMetadata, query: torch.Tensor, cache: torch.Tensor, spec: AttentionSpec, sinks: torch.Tensor
) -> torch.Tensor:
    outputs = []
    for i, q in enumerate(query.split(list(common.query_lens))):
        n = common.context_lens[i]
        blocks = common.block_tables[i, : -(-n // cache.shape[2])].long()
        k, v = (cache[blocks, half].flatten(0, 1)[:n] for half in (0, 1))
        outputs.append(attend(q, k, v, spec, visible_keys(spec, len(q), n, query.device), sinks))
    return torch.cat(outputs)


def _check(output: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ((output.double() - wanted).norm() / wanted.norm()).item() < 0.012


@CUDA
@pytest.mark.gpu
class TestOnAGpu:
    SINKS = replace(SPEC, has_sinks=True)

    def _layer(
        self, common: CommonAttentionMetadata, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        blocks = int(common.block_tables.max()) + 1
        cache = torch.randn(blocks, 2, block_size, 2, 128, device="cuda", dtype=torch.bfloat16)
        query = torch.randn(sum(common.query_lens), 8, 128, device="cuda", dtype=torch.bfloat16)
        return query, cache, torch.randn(8, device="cuda")

    @pytest.mark.parametrize("lens", [((1, 4101),) * 34, ((5, 300), (1, 257), (33, 320)) * 3], ids=["decode", "mixed"])
    def test_cascade(self, lens: tuple[tuple[int, int], ...]) -> None:
        pytest.importorskip("flashinfer")
        backend = get_backend("FLASHINFER")
        spec = self.SINKS
        common = batch(16, "cuda", lens, common_prefix_len=min(keys for _, keys in lens) // 256 * 256)
        query, cache, sinks = self._layer(common, 16)
        builder = backend.builder_class(spec, torch.bfloat16, 16, torch.device("cuda"))
        metadata = builder.build(common)
        assert type(metadata.plan).__name__ == "Cascade"  # type: ignore[attr-defined]
        output = backend.impl_class(spec, sinks).forward(query, None, None, cache, metadata)
        _check(output, _reference(common, query, cache, spec, sinks))

    def test_a_plan_that_is_gone_is_noticed(self) -> None:
        pytest.importorskip("flashinfer")
        backend = get_backend("FLASHINFER")
        common = batch(16, "cuda")
        query, cache, _ = self._layer(common, 16)
        builder = backend.builder_class(SPEC, torch.bfloat16, 16, torch.device("cuda"))
        stale, current = builder.build(common), builder.build(common)
        impl = backend.impl_class(SPEC)
        impl.forward(query, None, None, cache, current)
        with pytest.raises(AttentionInputError, match="plan is gone"):
            impl.forward(query, None, None, cache, stale)

    def test_xqa_is_captured_with_lengths_and_tables_that_change(self) -> None:
        pytest.importorskip("flashinfer")
        backend = get_backend("FLASHINFER")
        before, after = (batch(16, "cuda", tuple((1, n) for n in lens)) for lens in ((33, 170, 1), (40, 161, 17)))
        query, cache, sinks = self._layer(after, 16)
        static = replace(after, seq_lens=before.seq_lens.clone(), block_tables=after.block_tables.clone())
        static.block_tables[:, : before.block_tables.shape[1]] = before.block_tables
        impl = backend.impl_class(self.SINKS, sinks)
        metadata = backend.builder_class(self.SINKS, torch.bfloat16, 16, torch.device("cuda")).build(static)
        output = torch.empty_like(query)
        impl.forward(query, None, None, cache, metadata, output)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            impl.forward(query, None, None, cache, metadata, output)
        static.seq_lens.copy_(after.seq_lens)
        static.block_tables.copy_(after.block_tables)
        graph.replay()
        _check(output, _reference(after, query, cache, self.SINKS, sinks))

    @pytest.mark.parametrize("block_size", [16, 128, 256])
    @pytest.mark.parametrize("version", FlashAttnVersion)
    def test_flash_attn_versions(self, version: FlashAttnVersion, block_size: int) -> None:
        backend = get_backend("FLASH_ATTN")
        with force_flash_attn_version(version):
            refused = backend.refuse(Platform.of("cuda"), AttentionNeeds(self.SINKS, torch.bfloat16, block_size))
            if refused:
                pytest.skip("; ".join(refused))
            builder = backend.builder_class(self.SINKS, torch.bfloat16, block_size, torch.device("cuda"))
        common = batch(block_size, "cuda")
        query, cache, sinks = self._layer(common, block_size)
        output = backend.impl_class(self.SINKS, sinks).forward(query, None, None, cache, builder.build(common))
        _check(output, _reference(common, query, cache, self.SINKS, sinks))


def test_a_plan_of_another_backend_is_refused() -> None:
    query = torch.zeros(sum(q for q, _ in LENS), 8, 128)
    for name in ("FLASHINFER", "FLASH_ATTN"):
        with pytest.raises(AttentionInputError, match=f"planned for {name} is needed, not AttentionMetadata"):
            get_backend(name).impl_class(SPEC).forward(query, None, None, None, AttentionMetadata(batch()))
