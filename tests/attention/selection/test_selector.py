"""Who is chosen, by whom, and why not the others, on platforms that are described rather than present."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from attention.errors import AttentionBackendError
from attention.platform import SIMULATED, DeviceKind, Platform
from attention.selection.priority import candidates
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import (
    Selection,
    force_attn_backend,
    log_selection,
    select_backend,
    unsupported_reasons,
)
from attention.spec import FP8, AttentionNeeds, AttentionSpec, AttentionType, Feature, MLASpec, Phase

SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)
MLA = AttentionSpec(128, 1, 576, 192**-0.5, mla=MLASpec(512, 128, 64, 128))
CPU = Platform(DeviceKind.CPU, "CPU")


def needs(
    spec: AttentionSpec = SPEC,
    dtype: torch.dtype = torch.bfloat16,
    phase: Phase | None = None,
    block_size: int = 16,
    features: frozenset[Feature] = frozenset(),
) -> AttentionNeeds:
    return AttentionNeeds(spec, dtype, block_size, phase, features)


def chosen(platform: str | Platform, wanted: AttentionNeeds) -> str:
    described = Platform.simulate(platform) if isinstance(platform, str) else platform
    return select_backend(described, wanted).backend.name


def by_phase(platform: str | Platform, wanted: AttentionNeeds) -> tuple[str, str]:
    prefill, decode = (chosen(platform, replace(wanted, phase=phase)) for phase in Phase)
    return prefill, decode


def reasons(selection: Selection, name: str) -> tuple[str, ...]:
    return next(candidate.reasons for candidate in selection.candidates if candidate.name == name)


class TestWhoDecides:
    def test_priority_when_nobody_says_anything(self) -> None:
        selection = select_backend(CPU, needs())
        assert (selection.backend.name, selection.because) == ("CPU_ATTN", "first by priority")
        assert reasons(selection, "CPU_ATTN") == ()

    def test_measured_beats_priority(self) -> None:
        selection = select_backend(CPU, needs(), fastest=("TORCH_SDPA", "CPU_ATTN"))
        assert (selection.backend.name, selection.because) == ("TORCH_SDPA", "measured fastest")
        assert [candidate.name for candidate in selection.candidates[:2]] == ["TORCH_SDPA", "CPU_ATTN"]

    def test_configured_beats_measured(self) -> None:
        selection = select_backend(CPU, needs(), configured="CPU_ATTN", fastest=("TORCH_SDPA",))
        assert (selection.backend.name, selection.because) == ("CPU_ATTN", "configured")

    def test_code_beats_configured_for_as_long_as_it_runs(self) -> None:
        with force_attn_backend("CPU_ATTN"):
            selection = select_backend(CPU, needs(), configured="TORCH_SDPA")
            assert (selection.backend.name, selection.because) == ("CPU_ATTN", "forced in code")
        assert select_backend(CPU, needs(), configured="TORCH_SDPA").backend.name == "TORCH_SDPA"

    def test_one_phase_can_be_forced_apart(self) -> None:
        with force_attn_backend("TORCH_SDPA", Phase.DECODE):
            assert by_phase(CPU, needs()) == ("CPU_ATTN", "TORCH_SDPA")
            assert chosen(CPU, needs()) == "CPU_ATTN"
            with force_attn_backend("FLEX_ATTENTION", Phase.PREFILL):
                assert by_phase(CPU, needs()) == ("FLEX_ATTENTION", "TORCH_SDPA")
            with force_attn_backend("FLEX_ATTENTION"):
                assert by_phase(CPU, needs()) == ("FLEX_ATTENTION", "FLEX_ATTENTION")
            assert by_phase(CPU, needs()) == ("CPU_ATTN", "TORCH_SDPA")
        assert by_phase(CPU, needs()) == ("CPU_ATTN", "CPU_ATTN")

    def test_a_fast_backend_that_refuses_or_is_not_for_everyday_use_is_passed_over(self) -> None:
        alibi = needs(replace(SPEC, alibi_slopes=(0.5,) * 32))
        measured = ("NO_ATTENTION", "FLASH_ATTN", "XFORMERS", "CPU_ATTN")
        assert select_backend(CPU, alibi, fastest=measured).backend.name == "CPU_ATTN"

    def test_the_choice_is_logged_in_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            log_selection(select_backend(CPU, needs()), "prefill")
        assert [record.getMessage() for record in caplog.records] == [
            "attention backend of prefill: CPU_ATTN (first by priority)"
        ]


class TestNames:
    def test_a_wrong_one_lists_the_right_ones_and_the_nearest(self) -> None:
        with pytest.raises(AttentionBackendError, match=r"'torch_spda'.*did you mean TORCH_SDPA\?") as caught:
            select_backend(CPU, needs(), configured="torch_spda")
        assert all(name in str(caught.value) for name in BACKENDS)

    def test_case_matters(self) -> None:
        with pytest.raises(AttentionBackendError, match=r"'flashinfer'.*did you mean FLASHINFER\?"):
            select_backend(Platform.simulate("sm90"), needs(), configured="flashinfer")

    def test_a_wrong_one_cannot_be_forced(self) -> None:
        with pytest.raises(AttentionBackendError, match="unknown attention backend"), force_attn_backend("nothing"):
            pass

    @pytest.mark.parametrize("name", BACKENDS)
    def test_those_of_registry_and_class_agree(self, name: str) -> None:
        assert get_backend(name).name == name == name.upper()

    def test_every_candidate_exists(self) -> None:
        tree = frozenset({Feature.TREE_MASK})
        kinds = [needs(phase=phase, features=tree) for phase in Phase] + [needs(MLA)]
        names = {name for platform in SIMULATED.values() for kind in kinds for name in candidates(platform, kind)}
        assert names == set(BACKENDS) - {"NO_ATTENTION"}


class TestRefusals:
    def test_a_configured_backend_that_refuses_says_why_and_nothing_takes_its_place(self) -> None:
        with pytest.raises(AttentionBackendError, match=r"FLASH_ATTN cannot run this model: runs on cuda.* not on cpu"):
            select_backend(CPU, needs(), configured="FLASH_ATTN")

    def test_nothing_usable_gives_every_backends_reasons(self) -> None:
        with pytest.raises(AttentionBackendError) as caught:
            select_backend(CPU, needs(dtype=torch.int8))
        text = str(caught.value)
        assert all(f"{name}: " in text for name in candidates(CPU, needs()))
        assert "dtype int8 is none of" in text
        with pytest.raises(AttentionBackendError, match=r"no attention backend for TPU: none is made for it"):
            select_backend(Platform.simulate("tpu"), needs(MLA))

    def test_every_kind_of_layer_must_be_accepted(self) -> None:
        bad = AttentionSpec(num_heads=3, num_kv_heads=2, head_size=16, scale=0.25)
        with pytest.raises(AttentionBackendError, match="3 query heads do not divide among 2"):
            select_backend(CPU, [needs(), needs(bad)])
        alibi = needs(replace(SPEC, alibi_slopes=(0.5,) * 32))
        ampere = Platform.simulate("sm80")
        both = select_backend(ampere, [needs(), alibi])
        assert not both.backend.refuse(ampere, needs())
        assert not both.backend.refuse(ampere, alibi)

    @pytest.mark.parametrize(
        ("name", "platform", "wanted", "reason"),
        [
            ("FLASHINFER", "sm90", needs(replace(SPEC, head_size=576)), "head size 576"),
            ("TRITON_ATTN", "sm90", needs(block_size=3), "block size 3"),
            ("FLASH_ATTN", "sm90", needs(dtype=torch.float32), "dtype float32"),
            ("TREE_ATTN", "sm90", needs(replace(SPEC, attn_type=AttentionType.ENCODER)), "attention type encoder"),
            ("CUTLASS_MLA", "sm100", needs(MLA, phase=Phase.PREFILL, block_size=128), "not for prefill"),
            ("IPEX", "xpu", needs(replace(SPEC, has_sinks=True)), "sinks"),
        ],
    )
    def test_a_reason_names_the_value(self, name: str, platform: str, wanted: AttentionNeeds, reason: str) -> None:
        found = unsupported_reasons(name, Platform.simulate(platform), [wanted])
        assert any(reason in text for text in found)

    def test_a_missing_library_is_a_reason_and_the_next_one_is_taken(self) -> None:
        blackwell = Platform.simulate("sm100")
        selection = select_backend(blackwell.without("flashinfer"), needs())
        assert any("flashinfer-python is not installed" in reason for reason in reasons(selection, "FLASHINFER"))
        assert selection.backend.name == "FLASH_ATTN"


class TestTuring:
    def test_half_precision_runs_in_triton(self) -> None:
        turing = Platform.simulate("sm75")
        assert by_phase(turing, needs(dtype=torch.float16)) == ("TRITON_ATTN", "TRITON_ATTN")
        assert chosen(turing.without("triton"), needs(dtype=torch.float16)) in ("FLEX_ATTENTION", "XFORMERS")

    def test_bfloat16_is_refused_by_all(self) -> None:
        with pytest.raises(AttentionBackendError, match=r"TRITON_ATTN: bfloat16 needs SM 8.0 or newer, this is SM 7.5"):
            select_backend(Platform.simulate("sm75"), needs())

    def test_flash_attention_is_too_new(self) -> None:
        found = unsupported_reasons("FLASH_ATTN", Platform.simulate("sm75"), [needs(dtype=torch.float16)])
        assert any("or newer, this is SM 7.5" in reason for reason in found)


class TestAmpereAndAda:
    @pytest.mark.parametrize("platform", ["sm80", "sm89"])
    def test_flash_attention(self, platform: str) -> None:
        assert by_phase(platform, needs()) == ("FLASH_ATTN", "FLASH_ATTN")

    @pytest.mark.parametrize("special", [{"kv_cache_dtype": FP8}, {"has_sinks": True}])
    def test_fp8_and_sinks_run_in_triton(self, special: dict[str, object]) -> None:
        assert by_phase("sm89", needs(replace(SPEC, **special))) == ("TRITON_ATTN", "TRITON_ATTN")


class TestHopper:
    def test_it_is_not_blackwell(self) -> None:
        packages = Platform.simulate("sm90").packages
        h200 = Platform(DeviceKind.CUDA, "NVIDIA H200", (9, 0), packages=packages, simulated=True)
        assert h200.sm == "SM 9.0"
        assert by_phase(h200, needs()) == by_phase("sm90", needs()) != by_phase("sm100", needs())
        assert any(
            "SM 10.0" in reason for reason in unsupported_reasons("CUTLASS_MLA", h200, [needs(MLA, block_size=128)])
        )

    @pytest.mark.parametrize("missing", [(), ("flash_attn_3",), ("flash_attn_4",)])
    def test_flash_attention_3_or_4_prefills_and_triton_decodes(self, missing: tuple[str, ...]) -> None:
        assert by_phase(Platform.simulate("sm90").without(*missing), needs()) == ("FLASH_ATTN", "TRITON_ATTN")

    def test_without_them_flashinfer_prefills(self) -> None:
        bare = Platform.simulate("sm90").without("flash_attn_3", "flash_attn_4")
        assert by_phase(bare, needs()) == ("FLASHINFER", "TRITON_ATTN")
        assert by_phase(bare.without("flashinfer"), needs()) == ("TRITON_ATTN", "TRITON_ATTN")

    def test_an_fp8_cache_is_read_as_it_is(self) -> None:
        assert by_phase("sm90", needs(replace(SPEC, kv_cache_dtype=FP8))) == ("TRITON_ATTN", "TRITON_ATTN")

    @pytest.mark.parametrize(
        "special", [{"sliding_window": 4096}, {"logits_soft_cap": 50.0}, {"alibi_slopes": (0.5,) * 32}]
    )
    def test_what_only_flash_attention_2_can_do_or_nobody_measured_is_not_prefilled_by_it(
        self, special: dict[str, object]
    ) -> None:
        wanted = needs(replace(SPEC, **special), phase=Phase.PREFILL)
        assert by_phase("sm90", wanted)[0] != "FLASH_ATTN"
        order = candidates(Platform.simulate("sm90"), wanted)
        assert order.index("FLASHINFER") < order.index("TRITON_ATTN") < order.index("FLASH_ATTN")

    def test_a_measurement_turns_the_order_round(self) -> None:
        decode = needs(phase=Phase.DECODE)
        selection = select_backend(Platform.simulate("sm90"), decode, fastest=("FLASHINFER", "TRITON_ATTN"))
        assert (selection.backend.name, selection.because) == ("FLASHINFER", "measured fastest")


class TestBlackwell:
    def test_flashinfer_first(self) -> None:
        assert by_phase("sm100", needs()) == ("FLASHINFER", "FLASHINFER")


class TestOtherHardware:
    def test_a_cpu(self) -> None:
        assert by_phase("cpu", needs()) == ("CPU_ATTN", "CPU_ATTN")

    @pytest.mark.parametrize(
        ("platform", "names"),
        [("rocm", ("ROCM_AITER_FA", "ROCM_ATTN", "ROCM_FLASH")), ("tpu", ("PALLAS",)), ("xpu", ("IPEX",))],
    )
    def test_others_have_their_own(self, platform: str, names: tuple[str, ...]) -> None:
        assert set(by_phase(platform, needs())) <= set(names)

    def test_rocm_without_aiter_runs_triton_kernels(self) -> None:
        bare = Platform.simulate("rocm").without("aiter")
        assert set(by_phase(bare, needs())) <= {"ROCM_ATTN", "ROCM_FLASH"}

    def test_cuda_backends_are_for_cuda(self) -> None:
        for name in ("FLASHINFER", "XFORMERS", "FLASHMLA", "CUTLASS_MLA"):
            for platform in ("cpu", "rocm", "tpu", "xpu"):
                assert any(
                    "not on" in reason for reason in unsupported_reasons(name, Platform.simulate(platform), [needs()])
                )


class TestUnusualLayers:
    @pytest.mark.parametrize("size", [37, 576])
    def test_any_head_size_runs_somewhere_on_a_gpu(self, size: int) -> None:
        odd = needs(replace(SPEC, head_size=size, scale=size**-0.5))
        for platform in ("sm80", "sm90", "sm100"):
            selection = select_backend(Platform.simulate(platform), odd)
            assert selection.backend.capabilities.head_sizes.accepts(size)
            assert any(f"head size {size}" in reason for reason in reasons(selection, "FLASHINFER"))

    @pytest.mark.parametrize("platform", ["sm80", "sm90", "sm100", "cpu"])
    def test_a_tree_has_its_own_backend(self, platform: str) -> None:
        assert chosen(platform, needs(features=frozenset({Feature.TREE_MASK}))) == "TREE_ATTN"

    @pytest.mark.parametrize("feature", ["sliding_window", "logits_soft_cap", "alibi_slopes", "has_sinks"])
    @pytest.mark.parametrize("platform", ["sm80", "sm90", "sm100", "cpu"])
    def test_whoever_is_chosen_can_do_it(self, platform: str, feature: str) -> None:
        values = {"sliding_window": 128, "logits_soft_cap": 50.0, "alibi_slopes": (0.5,) * 32, "has_sinks": True}
        wanted = needs(replace(SPEC, **{feature: values[feature]}))
        for phase in Phase:
            selection = select_backend(Platform.simulate(platform), replace(wanted, phase=phase))
            assert wanted.all_features <= selection.backend.capabilities.features


class TestMLA:
    @pytest.mark.parametrize(
        ("platform", "block_size", "decode"),
        [
            ("sm90", 64, "FLASHMLA"),
            ("sm100", 128, "CUTLASS_MLA"),
            ("sm100", 64, "FLASHINFER_MLA"),
            ("rocm", 64, "ROCM_AITER_MLA"),
            ("cpu", 64, "CPU_MLA"),
        ],
    )
    def test_its_own_family(self, platform: str, block_size: int, decode: str) -> None:
        assert by_phase(platform, needs(MLA, block_size=block_size))[1] == decode

    @pytest.mark.parametrize("platform", ["sm80", "sm90", "sm100", "rocm", "cpu"])
    def test_nothing_else_is_looked_at(self, platform: str) -> None:
        for phase in Phase:
            selection = select_backend(Platform.simulate(platform), needs(MLA, phase=phase, block_size=64))
            assert all(get_backend(candidate.name).capabilities.mla for candidate in selection.candidates)

    def test_ordinary_backends_refuse_it_and_it_refuses_ordinary_layers(self) -> None:
        assert "not made for MLA layers" in unsupported_reasons("CPU_ATTN", CPU, [needs(MLA)])
        assert "made for MLA layers only" in unsupported_reasons("CPU_MLA", CPU, [needs()])
