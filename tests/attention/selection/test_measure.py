"""Measuring backends, ranking them, and keeping the result for as long as it holds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attention.backends.mla.cpu_mla import CpuMLAImpl
from attention.backends.torch_sdpa.cpu_attn import CpuAttnBackend
from attention.errors import AttentionBackendError
from attention.platform import DeviceKind, Platform
from attention.selection.measure import default_shapes, measure
from attention.selection.measurements import (
    Conditions,
    Excluded,
    Measurement,
    Record,
    Shape,
    load_ranking,
    load_records,
    ranking,
    save_record,
)
from attention.selection.reference import reference_attention
from attention.selection.registry import BACKENDS
from attention.selection.selector import select_backend
from attention.spec import FP8, AttentionNeeds, AttentionSpec, AttentionType, Feature, MLASpec, Phase
from attention_reference import attend, visible_keys

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)
NEEDS = AttentionNeeds(SPEC, torch.float32, 16, features=frozenset({Feature.PREFIX}))
SHAPES = {Phase.PREFILL: (Shape(1, 32, 32), Shape(1, 8, 40)), Phase.DECODE: (Shape(1, 1, 20), Shape(3, 1, 64))}

Compete = Callable[..., None]


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.selection.measure.ENOUGH_S", 0.0)


@pytest.fixture
def compete(monkeypatch: pytest.MonkeyPatch) -> Compete:
    """Let these backends, registered under their names, be the only candidates."""

    def register(*backends: type[CpuAttnBackend]) -> None:
        module = types.ModuleType("contestants")
        monkeypatch.setitem(sys.modules, "contestants", module)
        names = {backend.name: f"contestants:{backend.__name__}" for backend in backends}
        for backend in backends:
            setattr(module, backend.__name__, backend)
        monkeypatch.setattr("attention.selection.registry.BACKENDS", {**BACKENDS, **names})
        monkeypatch.setattr("attention.selection.measure.candidates", lambda *_: ("CPU_ATTN", "TORCH_SDPA", *names))

    return register


def broken(how: Callable[[torch.Tensor], torch.Tensor]) -> type[CpuAttnBackend]:
    """A backend that does something to the right output."""

    class Impl(CpuAttnBackend.impl_class):  # type: ignore[name-defined]
        def forward(self, *args: Any) -> torch.Tensor:
            output: torch.Tensor = super().forward(*args)
            return output.copy_(how(output))

    class Broken(CpuAttnBackend):
        name = "BROKEN"
        impl_class = Impl

    return Broken


def test_every_correct_candidate_is_timed_on_every_shape(compete: Compete) -> None:
    compete()
    lines: list[str] = []
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES, lines.append)
    assert {(m.backend, m.phase, m.shape) for m in record.measurements} == {
        (name, phase, shape) for name in ("CPU_ATTN", "TORCH_SDPA") for phase in Phase for shape in SHAPES[phase]
    }
    assert all(0 < m.seconds < 10 for m in record.measurements)
    assert record.excluded == ()
    assert sum("ms: " in line for line in lines) == 4
    assert [line for line in lines if "checking" in line] == [
        f"{phase}: checking {name}" for phase in (Phase.DECODE, Phase.PREFILL) for name in ("CPU_ATTN", "TORCH_SDPA")
    ]
    assert {*ranking(record.measurements)} == {"CPU_ATTN", "TORCH_SDPA"}


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, sliding_window=24),
        replace(SPEC, logits_soft_cap=2.0, alibi_slopes=(0.5, 0.25, 0.125, 0.0625)),
        replace(SPEC, has_sinks=True),
        replace(SPEC, kv_cache_dtype=FP8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_features_pass_the_check(spec: AttentionSpec, dtype: torch.dtype, compete: Compete) -> None:
    compete()
    needs = replace(NEEDS, spec=spec, dtype=dtype)
    shapes = {Phase.PREFILL: (Shape(1, 8, 16),), Phase.DECODE: (Shape(1, 1, 16),)}
    record = measure(Platform.of(CPU), CPU, needs, shapes)
    accepting = [m.backend for m in record.measurements]
    assert record.excluded == ()
    assert "CPU_ATTN" in accepting


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda output: output * 1.05, "wrong numbers: off by"),
        (lambda output: output.index_fill(0, torch.tensor([0]), float("nan")), "wrong numbers: off by nan"),
        (lambda output: output[:, :1], r"wrong numbers"),
        (lambda output: torch.empty(0).view(3), "failed at a small batch: RuntimeError: "),
    ],
)
def test_a_wrong_backend_is_out_with_the_reason(
    how: Callable[[torch.Tensor], torch.Tensor], reason: str, compete: Compete
) -> None:
    compete(broken(how))
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES)
    assert [(e.backend, e.phase) for e in record.excluded] == [("BROKEN", phase) for phase in Phase]
    assert all(reason in e.reason for e in record.excluded)
    assert {m.backend for m in record.measurements} == {"CPU_ATTN", "TORCH_SDPA"}


def test_a_backend_that_fails_on_one_shape_only_is_not_ranked(compete: Compete) -> None:
    def too_long(output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] == 300:
            raise RuntimeError("out of shared memory\ndetails")
        return output

    compete(broken(too_long))
    shapes = {Phase.PREFILL: (Shape(1, 16, 16), Shape(1, 300, 300)), Phase.DECODE: (Shape(1, 1, 16),)}
    record = measure(Platform.of(CPU), CPU, NEEDS, shapes)
    assert record.excluded == (
        Excluded("BROKEN", Phase.PREFILL, "failed at 1 × 300: RuntimeError: out of shared memory"),
    )
    assert "BROKEN" not in ranking(record.measurements, Phase.PREFILL)
    assert "BROKEN" in ranking(record.measurements, Phase.DECODE)


def test_a_backend_that_is_far_too_slow_is_out(compete: Compete, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.selection.measure.TOO_SLOW_S", 0.0)
    compete()
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES)
    assert record.measurements == ()
    assert all("took" in e.reason and "1 × " in e.reason for e in record.excluded)


def test_a_backend_that_takes_long_to_be_ready_is_interrupted(
    compete: Compete, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_for_long(output: torch.Tensor) -> torch.Tensor:
        try:
            subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=True)
        except Exception as error:
            raise RuntimeError("the compiler failed") from error  # as libraries do
        return output

    monkeypatch.setattr("attention.selection.measure.FIRST_CALL_S", 0.5)
    compete(broken(compile_for_long))
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES)
    assert [(out.backend, out.phase, out.out_of_time) for out in record.excluded] == [
        ("BROKEN", phase, True) for phase in Phase
    ]
    assert {out.reason for out in record.excluded} == {"not ready after 0.5 s at a small batch"}
    assert {m.backend for m in record.measurements} == {"CPU_ATTN", "TORCH_SDPA"}


def test_what_the_budget_leaves_no_time_for_is_said(compete: Compete) -> None:
    compete()
    lines: list[str] = []
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES, lines.append, budget_s=0.0)
    assert record.measurements == ()
    assert {(out.backend, out.phase) for out in record.excluded if out.out_of_time} == {
        (name, phase) for name in ("CPU_ATTN", "TORCH_SDPA") for phase in Phase
    }
    assert {out.reason for out in record.excluded} == {"not tried: the time for measuring is over"}
    assert "prefill 1 × 32: left out, the time is over" in lines


def test_a_backend_that_is_many_times_slower_than_another_is_out(
    compete: Compete, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.selection.measure.HOPELESS_S", 0.02)

    def slow(output: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return output

    compete(broken(slow))
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES)
    assert [(out.backend, out.phase, out.out_of_time) for out in record.excluded] == [
        ("BROKEN", phase, False) for phase in Phase
    ]
    assert all("where another took" in out.reason for out in record.excluded)


def test_too_little_memory_is_said(compete: Compete, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("attention.selection.measure.caches_to_rotate", fail)
    compete()
    with pytest.raises(AttentionBackendError, match="cpu has too little free memory to measure 1 × 20"):
        measure(Platform.of(CPU), CPU, NEEDS, SHAPES)


def test_who_refuses_is_not_run(compete: Compete, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(CpuAttnBackend):
        name = "REFUSING"

        @classmethod
        def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
            return ["not today"] if needs.phase is Phase.DECODE else []

    compete(Refusing)
    record = measure(Platform.of(CPU), CPU, NEEDS, SHAPES)
    assert {m.phase for m in record.measurements if m.backend == "REFUSING"} == {Phase.PREFILL}
    assert record.excluded == ()


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.selection.measure.candidates", lambda *_: ("TRITON_ATTN",))
    platform = replace(Platform.of(CPU), packages={"triton": "3"}, triton_interpreter=True)
    record = measure(platform, CPU, NEEDS, SHAPES)
    assert {(e.backend, e.reason) for e in record.excluded} == {("TRITON_ATTN", "its kernels are interpreted here")}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(AttentionBackendError, match="nothing can be measured on H100/H200"):
        measure(Platform.simulate("sm90"), CPU, NEEDS)
    encoder = replace(SPEC, attn_type=AttentionType.ENCODER)
    with pytest.raises(AttentionBackendError, match="only decoder layers"):
        measure(Platform.of(CPU), CPU, replace(NEEDS, spec=encoder))


def test_latent_attention_is_measured_and_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = replace(NEEDS, spec=AttentionSpec(8, 1, 80, 0.1, mla=MLASpec(64, 16, 16, 24)))
    record = measure(Platform.of(CPU), CPU, latent, SHAPES)
    assert {m.backend for m in record.measurements} == {"CPU_MLA"}
    assert {(e.backend, e.reason) for e in record.excluded} <= {("TRITON_MLA", "its kernels are interpreted here")}
    save_record(tmp_path / "record.json", record)
    assert list(load_ranking(tmp_path / "record.json", Platform.of(CPU), [replace(latent, phase=Phase.DECODE)])) == [
        "CPU_MLA"
    ]

    def spoiled(impl: CpuMLAImpl, *args: Any) -> torch.Tensor:
        output = honest(impl, *args)
        return output.mul_(1.1) if args[4].common.decode_only else output

    honest = CpuMLAImpl.forward
    monkeypatch.setattr(CpuMLAImpl, "forward", spoiled)
    excluded = measure(Platform.of(CPU), CPU, latent, SHAPES).excluded
    assert [e.phase for e in excluded if e.reason.startswith("wrong numbers")] == [Phase.DECODE]


@pytest.mark.parametrize("platform", ["cpu", "sm90"])
def test_default_shapes_cover_lengths_batches_and_contexts(platform: str) -> None:
    prefill, decode = (default_shapes(Platform.simulate(platform), phase) for phase in Phase)
    assert len({shape.query_len for shape in prefill}) >= 2
    assert any(shape.context_len > shape.query_len for shape in prefill)
    assert all(shape.query_len == 1 for shape in decode)
    assert len({shape.num_seqs for shape in decode}) * len({shape.context_len for shape in decode}) == len(decode) >= 4


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, num_kv_heads=1, sliding_window=7),
        replace(SPEC, logits_soft_cap=1.5),
        replace(SPEC, alibi_slopes=(0.5, 0.25, 0.125, 0.0625)),
        replace(SPEC, has_sinks=True, sliding_window=3),
    ],
)
def test_the_reference_is_that_of_the_conformance_suite(spec: AttentionSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(9, spec.num_heads, spec.head_size, generator=generator)
    key, value = torch.randn(2, 25, spec.num_kv_heads, spec.head_size, generator=generator)
    sinks = torch.randn(spec.num_heads, generator=generator) if spec.has_sinks else None
    visible = visible_keys(spec, 9, 25)
    expected = attend(query, key, value, spec, visible, sinks).float()
    torch.testing.assert_close(reference_attention(spec, query, key, value, sinks), expected, rtol=1e-5, atol=1e-5)


class TestRanking:
    A, B = Shape(1, 1, 10), Shape(8, 1, 10)

    def measured(self, *rows: tuple[str, Shape, float], phase: Phase = Phase.DECODE) -> list[Measurement]:
        return [Measurement(name, phase, shape, seconds) for name, shape, seconds in rows]

    def test_ratios_count_not_seconds(self) -> None:
        found = self.measured(("X", self.A, 1e-6), ("Y", self.A, 3e-6), ("X", self.B, 2.0), ("Y", self.B, 1.0))
        assert ranking(found) == ("X", "Y")

    def test_who_misses_a_shape_is_left_out(self) -> None:
        found = self.measured(("X", self.A, 1.0), ("X", self.B, 1.0), ("Y", self.A, 0.1))
        assert ranking(found) == ("X",)

    def test_phases_apart_and_together(self) -> None:
        decode = self.measured(("X", self.A, 1.0), ("Y", self.A, 2.0))
        prefill = self.measured(("X", self.A, 3.0), ("Y", self.A, 1.0), phase=Phase.PREFILL)
        assert ranking(decode + prefill, Phase.DECODE) == ("X", "Y")
        assert ranking(decode + prefill, Phase.PREFILL) == ranking(decode + prefill) == ("Y", "X")

    def test_nothing(self) -> None:
        assert ranking([]) == ()


class TestKeeping:
    PLATFORM = Platform(DeviceKind.CUDA, "NVIDIA H200", (9, 0), packages={"triton": "3.6.0"})

    def record(self, needs: AttentionNeeds = NEEDS, platform: Platform = PLATFORM, fast: str = "B") -> Record:
        slow = "A" if fast == "B" else "B"
        return Record(
            Conditions.of(platform, needs),
            (
                Measurement(slow, Phase.DECODE, Shape(1, 1, 10), 2e-6),
                Measurement(fast, Phase.DECODE, Shape(1, 1, 10), 1e-6),
            ),
            (Excluded("C", Phase.DECODE, "wrong numbers"),),
        )

    def test_what_is_kept_is_found_again(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "attention.json"
        rich = replace(NEEDS, spec=replace(SPEC, alibi_slopes=(0.5,) * 4, kv_cache_dtype=FP8, sliding_window=4))
        save_record(path, self.record())
        save_record(path, self.record(rich, fast="A"))
        assert load_records(path) == [self.record(), self.record(rich, fast="A")]
        assert load_ranking(path, self.PLATFORM, replace(NEEDS, phase=Phase.DECODE)) == ("B", "A")
        assert load_ranking(path, self.PLATFORM, replace(rich, phase=Phase.DECODE)) == ("A", "B")
        assert load_ranking(path, self.PLATFORM, replace(NEEDS, phase=Phase.PREFILL)) == ()
        assert not list(path.parent.glob(".*"))

    @pytest.mark.parametrize(
        "changed",
        [
            replace(NEEDS, dtype=torch.bfloat16),
            replace(NEEDS, block_size=32),
            replace(NEEDS, spec=replace(SPEC, head_size=32)),
            replace(NEEDS, spec=replace(SPEC, num_kv_heads=4)),
            replace(NEEDS, spec=replace(SPEC, sliding_window=64)),
            replace(NEEDS, spec=replace(SPEC, kv_cache_dtype=FP8)),
            replace(NEEDS, spec=replace(SPEC, has_sinks=True)),
        ],
    )
    def test_another_layer_has_its_own(self, changed: AttentionNeeds, tmp_path: Path) -> None:
        path = tmp_path / "attention.json"
        save_record(path, self.record())
        assert load_ranking(path, self.PLATFORM, changed) == ()

    def test_what_does_not_change_the_time_does_not_change_the_key(self, tmp_path: Path) -> None:
        path = tmp_path / "attention.json"
        save_record(path, self.record())
        same = replace(NEEDS, spec=replace(SPEC, kv_cache_dtype=torch.float32), features=frozenset())
        assert load_ranking(path, self.PLATFORM, replace(same, phase=Phase.DECODE)) == ("B", "A")

    def test_another_device_or_version_makes_it_stale(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "attention.json"
        save_record(path, self.record())
        for other in (
            replace(self.PLATFORM, name="NVIDIA H100"),
            replace(self.PLATFORM, packages={"triton": "3.7.0"}),
            replace(self.PLATFORM, packages={"triton": "3.6.0", "flashinfer": "0.7"}),
            self.PLATFORM.without("triton"),
        ):
            assert load_ranking(path, other, NEEDS) == ()
        assert load_ranking(path, self.PLATFORM, NEEDS) == ("B", "A")
        monkeypatch.setattr(torch, "__version__", "9.9")
        assert load_ranking(path, self.PLATFORM, NEEDS) == ()

    def test_a_new_record_takes_the_place_of_the_stale_one(self, tmp_path: Path) -> None:
        path = tmp_path / "attention.json"
        updated = replace(self.PLATFORM, packages={"triton": "3.7.0"})
        for platform in (self.PLATFORM, replace(self.PLATFORM, name="NVIDIA H100"), updated):
            save_record(path, self.record(platform=platform))
        assert [(r.conditions.device, r.conditions.versions["triton"]) for r in load_records(path)] == [
            ("NVIDIA H100 (SM 9.0)", "3.6.0"),
            ("NVIDIA H200 (SM 9.0)", "3.7.0"),
        ]

    def test_all_kinds_of_layer_must_be_there_and_count_alike(self, tmp_path: Path) -> None:
        path = tmp_path / "attention.json"
        windowed = replace(NEEDS, spec=replace(SPEC, sliding_window=64))
        save_record(path, self.record())
        assert load_ranking(path, self.PLATFORM, [NEEDS, windowed]) == ()
        save_record(path, self.record(windowed))
        assert load_ranking(path, self.PLATFORM, [NEEDS, windowed]) == ("B", "A")

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"format": 0, "records": []}', '{"format": 1, "records": [1]}']
    )
    def test_a_file_that_means_nothing_is_no_measurement(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "attention.json"
        path.write_text(content)
        assert load_ranking(path, self.PLATFORM, NEEDS) == ()
        save_record(path, self.record())
        assert load_ranking(path, self.PLATFORM, NEEDS) == ("B", "A")
        assert json.loads(path.read_text())["format"] == 1

    @pytest.mark.parametrize(("missing", "expected"), [("FLASHINFER", ()), ("XFORMERS", ("FLASH_ATTN", "TRITON_ATTN"))])
    def test_no_ranking_without_a_backend_that_is_preferred_to_the_fastest(
        self, missing: str, expected: tuple[str, ...], tmp_path: Path
    ) -> None:
        """Where nobody knows whether it is faster, the usual order holds; who comes later anyway changes nothing."""
        path = tmp_path / "attention.json"
        phase, shape = Phase.PREFILL, Shape(1, 10, 10)
        record = Record(
            Conditions.of(self.PLATFORM, NEEDS),
            (Measurement("TRITON_ATTN", phase, shape, 2e-6), Measurement("FLASH_ATTN", phase, shape, 1e-6)),
            (Excluded(missing, phase, "not ready", out_of_time=True),),
        )
        save_record(path, record)
        assert load_records(path) == [record]
        assert load_ranking(path, self.PLATFORM, replace(NEEDS, phase=phase)) == expected

    def test_no_file(self, tmp_path: Path) -> None:
        assert load_ranking(tmp_path / "none.json", self.PLATFORM, NEEDS) == ()


def test_from_measuring_to_choosing(compete: Compete, tmp_path: Path) -> None:
    compete()
    platform, path = Platform.of(CPU), tmp_path / "attention.json"
    record = measure(platform, CPU, NEEDS, SHAPES)
    save_record(path, record)
    for phase in Phase:
        wanted = replace(NEEDS, phase=phase)
        fastest = load_ranking(path, platform, wanted)
        assert fastest == ranking(record.measurements, phase)
        selection = select_backend(platform, wanted, fastest=fastest)
        assert (selection.backend.name, selection.because) == (fastest[0], "measured fastest")
