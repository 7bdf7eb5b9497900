"""Backends of hardware that is not here: who is chosen there, and what can be executed of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fake_kernels
from attention.backends.common.batch_split import split_batch
from attention.backends.ipex.backend import IpexBackend, single_blocks
from attention.backends.pallas.kernels import interpret_on_cpu
from attention.backends.rocm import rocm_flash
from attention.backends.rocm.aiter_fa import RocmAiterFaBackend
from attention.backends.rocm.rocm_attn import RocmAttnBackend
from attention.backends.rocm.rocm_flash import RocmFlashBackend, RocmFlashImpl
from attention.capability import Evidence
from attention.errors import AttentionBackendError, AttentionInputError
from attention.metadata import build_metadata
from attention.ops.triton.launch import INTERPRETED
from attention.platform import DeviceKind, Platform
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import select_backend, unsupported_reasons
from attention.spec import FP8, AttentionNeeds, AttentionSpec, AttentionType, Feature, MLASpec, Phase
from paged_case import MIXED, PagedCase, paged_case

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, scale=32**-0.5)
SLOPES = (0.5, 0.25, 0.125, 0.0625)
FEATURES = {
    "plain": SPEC,
    "mqa": replace(SPEC, num_kv_heads=1),
    "window": replace(SPEC, sliding_window=9),
    "alibi": replace(SPEC, alibi_slopes=SLOPES),
    "soft_cap": replace(SPEC, logits_soft_cap=2.0),
    "sinks": replace(SPEC, has_sinks=True),
    "fp8": replace(SPEC, kv_cache_dtype=FP8),
}
PROMPTS, DECODE = ((20, 20), (5, 5), (33, 33)), ((1, 1), (1, 16), (1, 17), (1, 40))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def check(case: PagedCase, got: torch.Tensor) -> None:
    tolerance = TOLERANCE[case.query.dtype]
    assert got.dtype == case.query.dtype
    torch.testing.assert_close(got.double(), case.expected, rtol=tolerance, atol=tolerance)


class TestRocmTriton:
    """ROCM_ATTN and ROCM_FLASH in Triton's interpreter."""

    pytestmark = interpreted

    @pytest.mark.parametrize("spec", FEATURES.values(), ids=FEATURES)
    @pytest.mark.parametrize("backend", [RocmAttnBackend, RocmFlashBackend], ids=lambda b: b.name)
    def test_mixed_batches_match_float64(
        self, backend: type[RocmAttnBackend | RocmFlashBackend], spec: AttentionSpec
    ) -> None:
        case = paged_case(spec, MIXED)
        poisoned = torch.full(case.query.shape, float("nan"))
        check(case, case.run(backend, poisoned))

    @pytest.mark.parametrize("lens", [PROMPTS, DECODE], ids=["prompts", "decode"])
    @pytest.mark.parametrize("feature", ["plain", "fp8"])
    @pytest.mark.parametrize("backend", [RocmAttnBackend, RocmFlashBackend], ids=lambda b: b.name)
    def test_batches_of_one_kind_match_float64(
        self, backend: type[RocmAttnBackend | RocmFlashBackend], feature: str, lens: tuple[tuple[int, int], ...]
    ) -> None:
        case = paged_case(FEATURES[feature], lens)
        check(case, case.run(backend))

    @pytest.mark.parametrize("backend", [RocmAttnBackend, RocmFlashBackend], ids=lambda b: b.name)
    def test_bf16_and_larger_blocks(self, backend: type[RocmAttnBackend | RocmFlashBackend]) -> None:
        case = paged_case(SPEC, MIXED, 64, torch.bfloat16)
        check(case, case.run(backend))

    def test_rocm_attn_decodes_with_the_decode_kernel_in_a_mixed_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from attention.ops.triton import decode

        seen = []
        real = decode.paged_decode
        monkeypatch.setattr(decode, "paged_decode", lambda q, *a, **k: (seen.append(len(q)), real(q, *a, **k)))
        case = paged_case(SPEC, MIXED)
        check(case, case.run(RocmAttnBackend))
        assert seen == [3]

    def test_rocm_attn_applies_masks_as_triton_attn_does(self) -> None:
        mask = torch.rand(sum(q * c for q, c in ((1, 20), (3, 9)))) < 0.7
        case = paged_case(SPEC, ((1, 20), (3, 9)))
        common = replace(case.common, custom_mask=mask)
        outputs = [
            replace(case, common=common, cache=case.cache.clone()).run(get_backend(name))
            for name in ("ROCM_ATTN", "TRITON_ATTN")
        ]
        assert torch.equal(*outputs)
        with pytest.raises(AttentionInputError, match="ROCM_FLASH cannot run a batch with a custom mask"):
            replace(case, common=common).run(RocmFlashBackend)


class TestComposableKernel:
    """ROCM_FLASH's prefill through the `flash_attn` package."""

    @pytest.fixture(autouse=True)
    def _package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package = fake_kernels.module("flash_attn", flash_attn_varlen_func=fake_kernels.flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn", package)

    @pytest.mark.parametrize("feature", ["plain", "mqa", "window", "alibi", "fp8"])
    def test_prompts_and_chunks(self, feature: str) -> None:
        case = paged_case(FEATURES[feature], [(20, 20), (7, 40), (17, 64)], 16, torch.bfloat16)
        check(case, case.run(RocmFlashBackend))

    def test_it_is_left_out_where_it_would_answer_wrong(self) -> None:
        def uses_it(spec: AttentionSpec) -> bool:
            sinks = torch.zeros(4) if spec.has_sinks else None
            return RocmFlashImpl(spec, sinks).has_composable_kernel

        assert uses_it(SPEC)
        assert not uses_it(FEATURES["soft_cap"])
        assert not uses_it(FEATURES["sinks"])

    def test_a_machine_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        assert rocm_flash.composable_kernel() is None


class TestAiter:
    """ROCM_AITER_FA through functions with aiter's signatures."""

    @pytest.fixture(autouse=True)
    def _package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package = fake_kernels.module(
            "aiter",
            flash_attn_varlen_func=fake_kernels.aiter_flash_attn_varlen_func,
            paged_attention_v1=fake_kernels.aiter_paged_attention_v1,
        )
        monkeypatch.setitem(sys.modules, "aiter", package)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("lens", [MIXED, PROMPTS, DECODE], ids=["mixed", "prompts", "decode"])
    @pytest.mark.parametrize("feature", ["plain", "mqa", "alibi", "soft_cap"])
    def test_matches_float64(self, feature: str, lens: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
        case = paged_case(FEATURES[feature], lens, 16, dtype)
        check(case, case.run(RocmAiterFaBackend, torch.full(case.query.shape, float("nan"), dtype=dtype)))

    def test_an_output_that_is_a_cut_of_a_larger_tensor(self) -> None:
        case = paged_case(SPEC, MIXED, 16, torch.float16)
        larger = torch.full((len(case.query), 6, 32), 5.0, dtype=torch.float16)
        check(case, case.run(RocmAiterFaBackend, larger[:, 1:5]))
        assert (larger[:, 0] == 5.0).all()
        assert (larger[:, 5] == 5.0).all()

    def test_the_workspace_grows_with_the_batch_and_is_kept(self) -> None:
        builder = RocmAiterFaBackend.builder_class(SPEC, torch.bfloat16, 16, CPU)
        sizes = []
        for context in (300, 20, 600):
            workspace = builder.build(build_metadata([1], [context], [list(range(40))], 16)).workspace
            sizes.append(workspace.numel())
        one = 4 * (32 * 2 + 2 * 4)
        assert sizes == [2 * one, 2 * one, 3 * one]

    def test_without_aiter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "aiter", None)
        with pytest.raises(AttentionBackendError, match="ROCM_AITER_FA needs amd-aiter"):
            RocmAiterFaBackend.impl_class(SPEC)


class TestIpex:
    """IPEX through a function with the extension's signature."""

    SPEC = replace(SPEC, head_size=64, scale=0.125)

    @pytest.fixture(autouse=True)
    def _package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        paged = fake_kernels.module("P", flash_attn_varlen_func=fake_kernels.ipex_flash_attn_varlen_func)
        llm = fake_kernels.module("llm", modules=fake_kernels.module("modules", PagedAttention=paged))
        package = fake_kernels.module("intel_extension_for_pytorch", llm=llm)
        monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", package)

    @pytest.mark.parametrize("lens", [MIXED, PROMPTS, DECODE], ids=["mixed", "prompts", "decode"])
    @pytest.mark.parametrize("more", [{}, {"sliding_window": 9}, {"logits_soft_cap": 2.0}], ids=str)
    def test_matches_float64(self, more: dict[str, float], lens: tuple[tuple[int, int], ...]) -> None:
        case = paged_case(replace(self.SPEC, **more), lens, 16, torch.float16)  # type: ignore[arg-type]
        check(case, case.run(IpexBackend))

    def test_an_output_that_is_a_cut_of_a_larger_tensor(self) -> None:
        case = paged_case(self.SPEC, MIXED, 32, torch.bfloat16)
        larger = torch.full((len(case.query), 5, 64), 5.0, dtype=torch.bfloat16)
        got = case.run(IpexBackend, larger[:, :4])
        check(case, got)
        assert got.data_ptr() == larger.data_ptr()
        assert (larger[:, 4] == 5.0).all()

    def test_single_blocks_are_views_of_the_cache(self) -> None:
        cache = torch.randn(3, 2, 4, 2, 8)
        keys, values = single_blocks(cache)
        assert keys.data_ptr() == cache.data_ptr()
        for block in range(3):
            assert torch.equal(keys[2 * block], cache[block, 0])
            assert torch.equal(values[2 * block], cache[block, 1])

    def test_without_the_extension(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", None)
        with pytest.raises(AttentionBackendError, match="IPEX needs intel-extension-for-pytorch"):
            IpexBackend.impl_class(self.SPEC)


@pytest.mark.parametrize("name", ["ROCM_ATTN", "ROCM_FLASH", "ROCM_AITER_FA", "IPEX", "PALLAS"])
def test_a_batch_of_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = fake_kernels.module("P")  # no function is there to be called
    llm = fake_kernels.module("llm", modules=fake_kernels.module("modules", PagedAttention=paged))
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", fake_kernels.module("ipex", llm=llm))
    monkeypatch.setitem(sys.modules, "aiter", fake_kernels.module("aiter"))
    backend = get_backend(name)
    metadata = backend.builder_class(SPEC, torch.float16, 16, CPU).build(build_metadata([], [], [], 16))
    query, key = torch.zeros(0, 4, 32, dtype=torch.float16), torch.zeros(0, 2, 32, dtype=torch.float16)
    cache = torch.zeros(1, 2, 16, 2, 32, dtype=torch.float16)
    with interpret_on_cpu():
        got = backend.impl_class(SPEC).forward(query, key, key, cache, metadata)
    assert got.shape == (0, 4, 32)


def test_a_batch_in_two_parts() -> None:
    tables = [[4], [2, 0], [3], [1, 5]]
    split = split_batch(build_metadata([1, 3, 2, 1], [4, 6, 2, 5], tables, 4), 4)
    assert split.prefill is not None
    assert split.decode is not None
    assert split.prefill.tokens is not None
    assert split.prefill.tokens.tolist() == [1, 2, 3, 4, 5]
    assert split.prefill.cu_seqlens_q.tolist() == [0, 3, 5]
    assert split.prefill.cu_seqlens_k.tolist() == [0, 6, 8]
    assert split.prefill.slots.tolist() == [8, 9, 10, 11, 0, 1, 12, 13]
    assert not split.prefill.whole
    assert split.decode.tokens is not None
    assert split.decode.tokens.tolist() == [0, 6]
    assert split.decode.context_lens == (4, 5)
    assert split.decode.block_tables[:, :1].tolist() == [[4], [1]]
    prompts = split_batch(build_metadata([2, 2], [2, 2], [[0], [1]], 4), 4)
    assert prompts.decode is None
    assert prompts.prefill is not None
    assert prompts.prefill.whole
    assert prompts.prefill.tokens is None


MODEL = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)
DEEPSEEK = AttentionSpec(128, 1, 576, 192**-0.5, mla=MLASpec(512, 128, 64, 128))


def chosen(platform: str, spec: AttentionSpec, phase: Phase, block_size: int = 16) -> str:
    needs = AttentionNeeds(spec, torch.bfloat16, block_size, phase)
    return select_backend(Platform.simulate(platform), needs).backend.name


def reasons(
    name: str,
    platform: str | Platform,
    spec: AttentionSpec,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    phase: Phase | None = None,
) -> list[str]:
    where = Platform.simulate(platform) if isinstance(platform, str) else platform
    return unsupported_reasons(name, where, [AttentionNeeds(spec, dtype, block_size, phase)])


class TestSelection:
    """Who is chosen on simulated platforms, and why others are not."""

    @pytest.mark.parametrize("phase", Phase)
    @pytest.mark.parametrize(("platform", "name"), [("rocm", "ROCM_AITER_FA"), ("tpu", "PALLAS"), ("xpu", "IPEX")])
    def test_the_family_s_own(self, platform: str, name: str, phase: Phase) -> None:
        assert chosen(platform, MODEL, phase) == name

    @pytest.mark.parametrize("phase", Phase)
    @pytest.mark.parametrize(
        "spec",
        [
            replace(MODEL, sliding_window=4096),
            replace(MODEL, kv_cache_dtype=FP8),
            replace(MODEL, has_sinks=True),
            replace(MODEL, head_size=96),
        ],
        ids=["window", "fp8", "sinks", "head_size"],
    )
    def test_rocm_falls_back_to_triton(self, spec: AttentionSpec, phase: Phase) -> None:
        assert chosen("rocm", spec, phase) == "ROCM_ATTN"
        assert len(reasons("ROCM_AITER_FA", "rocm", spec)) == 1

    def test_an_older_amd_gpu_has_no_aiter(self) -> None:
        radeon = replace(Platform.simulate("rocm"), name="RX 7900", arch="gfx1100")
        needs = AttentionNeeds(MODEL, torch.bfloat16, 16)
        selection = select_backend(radeon, needs)
        assert selection.backend.name == "ROCM_ATTN"
        assert selection.candidates[0].reasons == ("needs an architecture of gfx942, gfx950, this is gfx1100",)

    def test_aiter_s_limits(self) -> None:
        assert reasons("ROCM_AITER_FA", "rocm", MODEL, 64) == ["block size 64 is not one of: 16, 32"]
        assert reasons("ROCM_AITER_FA", "rocm", replace(MODEL, num_kv_heads=1)) == [
            "32 query heads for each key/value head, at most 16"
        ]
        both = replace(MODEL, logits_soft_cap=30.0, alibi_slopes=(0.1,) * 32)
        assert reasons("ROCM_AITER_FA", "rocm", both) == ["aiter adds ALiBi before the soft cap, not after it"]
        fp8 = reasons("ROCM_AITER_FA", "rocm", replace(MODEL, kv_cache_dtype=FP8))
        assert fp8 == ["aiter reads FP8 as e4m3fnuz on gfx942, the cache holds e4m3fn"]
        without = Platform.simulate("rocm").without("aiter")
        assert reasons("ROCM_AITER_FA", without, MODEL) == ["amd-aiter is not installed"]

    def test_ipex_s_limits(self) -> None:
        assert reasons("IPEX", "xpu", replace(MODEL, head_size=80)) == [
            "head size 80 is not one of: 64 to 256, multiples of 64"
        ]
        assert reasons("IPEX", "xpu", replace(MODEL, alibi_slopes=(0.1,) * 32)) == [
            "the extension's paged kernel is not tested with ALiBi"
        ]
        assert reasons("IPEX", "cpu", MODEL) == ["runs on xpu, not on cpu"]
        assert chosen("xpu", replace(MODEL, alibi_slopes=(0.1,) * 32), Phase.DECODE) == "TRITON_ATTN"

    @pytest.mark.parametrize("name", ["ROCM_ATTN", "ROCM_FLASH", "ROCM_AITER_FA", "PALLAS", "IPEX"])
    def test_none_of_them_runs_on_nvidia_or_a_cpu(self, name: str) -> None:
        home = {"PALLAS": "tpu", "IPEX": "xpu"}.get(name, "rocm")
        assert reasons(name, "sm90", MODEL) == [f"runs on {home}, not on cuda"]
        assert reasons(name, "cpu", MODEL) == [f"runs on {home}, not on cpu"]
        assert reasons(name, home, DEEPSEEK)[0] == "not made for MLA layers"

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("ROCM_ATTN", DeviceKind.ROCM),
            ("ROCM_FLASH", DeviceKind.ROCM),
            ("ROCM_AITER_FA", DeviceKind.ROCM),
            ("PALLAS", DeviceKind.TPU),
            ("IPEX", DeviceKind.XPU),
        ],
    )
    def test_their_rows_say_that_they_never_ran_there(self, name: str, kind: DeviceKind) -> None:
        devices = get_backend(name).capabilities.devices
        assert [(device.kind, device.ran_on) for device in devices] == [(kind, ())]

    def test_only_decoders_but_for_rocm_attn(self) -> None:
        encoder = replace(MODEL, attn_type=AttentionType.ENCODER_ONLY)
        assert reasons("ROCM_ATTN", "rocm", encoder) == []
        for name, platform in (("ROCM_FLASH", "rocm"), ("ROCM_AITER_FA", "rocm"), ("PALLAS", "tpu"), ("IPEX", "xpu")):
            assert reasons(name, platform, encoder) == [
                "attention type encoder_only is none of decoder",
                "non-causal is not supported",
            ]


class TestMLASelection:
    """Latent attention on simulated platforms."""

    @pytest.mark.parametrize(
        ("platform", "block_size", "prefill", "decode"),
        [
            ("sm80", 64, "FLASHINFER_MLA", "TRITON_MLA"),
            ("sm90", 64, "FLASH_ATTN_MLA", "FLASHMLA"),
            ("sm90", 32, "FLASH_ATTN_MLA", "TRITON_MLA"),
            ("sm100", 128, "FLASH_ATTN_MLA", "CUTLASS_MLA"),
            ("sm100", 64, "FLASH_ATTN_MLA", "FLASHINFER_MLA"),
            ("rocm", 16, "TRITON_MLA", "ROCM_AITER_MLA"),
            ("cpu", 16, "CPU_MLA", "CPU_MLA"),
        ],
    )
    def test_who_is_chosen(self, platform: str, block_size: int, prefill: str, decode: str) -> None:
        assert chosen(platform, DEEPSEEK, Phase.PREFILL, block_size) == prefill
        assert chosen(platform, DEEPSEEK, Phase.DECODE, block_size) == decode

    def test_an_fp8_cache_of_latents(self) -> None:
        fp8 = replace(DEEPSEEK, kv_cache_dtype=FP8)
        assert chosen("sm100", fp8, Phase.DECODE, 128) == "TRITON_MLA"
        assert chosen("sm100", fp8, Phase.DECODE, 64) == "FLASHINFER_MLA"
        assert chosen("sm90", fp8, Phase.DECODE, 64) == "TRITON_MLA"
        assert reasons("FLASHINFER_MLA", "sm80", fp8, 64) == ["an FP8 cache of latents needs SM 9.0 or newer"]
        assert reasons("FLASHINFER_MLA", "sm90", fp8, 64, torch.float16) == [
            "an FP8 cache of latents goes with bfloat16 queries on SM 9.0, not torch.float16"
        ]
        assert reasons("FLASHMLA", "sm90", fp8, 64) == ["FlashMLA reads FP8 in its sparse kernels only"]

    def test_reasons(self) -> None:
        assert reasons("FLASHMLA", "sm90", DEEPSEEK, 16) == ["block size 16 is not one of: 64"]
        assert reasons("FLASHMLA", "sm90", DEEPSEEK, 64, phase=Phase.PREFILL) == ["made for decode, not for prefill"]
        assert reasons("FLASHMLA", "sm100", DEEPSEEK, 64) == ["made for devices older than SM 10.0, this is SM 10.0"]
        assert reasons("FLASHMLA", "sm80", DEEPSEEK, 64) == ["needs SM 9.0 or newer, this is SM 8.0"]
        assert reasons("CUTLASS_MLA", "sm90", DEEPSEEK, 128) == ["needs SM 10.0 or newer, this is SM 9.0"]
        assert reasons("FLASH_ATTN_MLA", Platform.simulate("sm90").without("flash_attn_3", "flash_attn_4"), DEEPSEEK)[
            0
        ] == ("none of flash-attn-3, flash-attn-4 is installed")
        assert reasons("FLASHINFER_MLA", "sm100", DEEPSEEK, 128) == ["block size 128 is not one of: 32, 64 on SM 10.x"]
        many = replace(DEEPSEEK, num_heads=192)
        assert reasons("CUTLASS_MLA", "sm100", many, 128) == ["192 query heads, at most 128"]
        assert reasons("FLASHMLA", "sm90", DEEPSEEK, 64, torch.float32) == [
            "dtype float32 is none of bfloat16, float16"
        ]
        small = AttentionSpec(16, 1, 320, 0.1, mla=MLASpec(256, 64, 64, 64))
        assert reasons("FLASHMLA", "sm90", small, 64) == ["head size 320 is not one of: 576"]
        assert reasons("TRITON_MLA", "sm90", small, 64) == []
        assert reasons("TRITON_MLA", "sm90", replace(small, head_size=640), 64) == [
            "a latent of 640 numbers, at most 576"
        ]
        assert reasons("CPU_MLA", "cpu", MODEL) == ["made for MLA layers only"]

    def test_tpus_and_intel_gpus_have_none(self) -> None:
        for platform in ("tpu", "xpu"):
            with pytest.raises(AttentionBackendError, match="none is made for it"):
                chosen(platform, DEEPSEEK, Phase.DECODE)

    def test_the_cpu_runs_it(self) -> None:
        assert get_backend("CPU_MLA").capabilities.evidence(Platform.of("cpu")) is Evidence.RAN
        needs = AttentionNeeds(DEEPSEEK, torch.float32, 16, features=frozenset({Feature.PREFIX}))
        assert unsupported_reasons("CPU_MLA", Platform.of("cpu"), [needs]) == []


def test_rows_can_be_read_without_any_kernel_library() -> None:
    """Importing a backend imports no library: this is a machine on which none can be."""
    names = [name for name in BACKENDS if name.startswith(("ROCM", "PALLAS", "IPEX")) or name.endswith("MLA")]
    libraries = ("triton", "jax", "aiter", "flash_attn", "torch_xla", "intel_extension_for_pytorch", "flash_mla")
    script = (
        "import sys\n"
        f"for name in {libraries}:\n"
        "    sys.modules[name] = None\n"
        "from attention.selection.registry import get_backend\n"
        f"assert all(get_backend(name).capabilities.devices for name in {names!r})\n"
    )
    assert len(names) == 12
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
