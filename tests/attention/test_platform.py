"""Platforms: this machine's, and those that are described."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from attention.capability import DeviceSupport, Evidence
from attention.errors import AttentionBackendError
from attention.platform import PACKAGES, SIMULATED, DeviceKind, Platform, installed_packages
from attention.selection.registry import BACKENDS, get_backend


def test_this_machines_cpu() -> None:
    platform = Platform.of("cpu")
    assert (platform.kind, platform.capability, platform.sm, platform.simulated) == (DeviceKind.CPU, None, None, False)
    assert dict(platform.packages) == installed_packages()


def test_an_unknown_kind_of_device_is_refused() -> None:
    with pytest.raises(AttentionBackendError, match="device meta: no attention backend knows devices of type meta"):
        Platform.of("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machines_gpu() -> None:
    platform = Platform.of("cuda")
    assert platform.kind is DeviceKind.CUDA
    assert platform.capability == torch.cuda.get_device_capability()
    assert str(platform) == f"{torch.cuda.get_device_name()} ({platform.sm})"


@pytest.mark.parametrize(
    ("name", "capability"), [("sm75", (7, 5)), ("sm80", (8, 0)), ("sm89", (8, 9)), ("sm90", (9, 0)), ("sm100", (10, 0))]
)
def test_nvidias_generations(name: str, capability: tuple[int, int]) -> None:
    platform = Platform.simulate(name)
    assert (platform.kind, platform.capability, platform.simulated) == (DeviceKind.CUDA, capability, True)
    assert platform.sm == f"SM {capability[0]}.{capability[1]}"


@pytest.mark.parametrize("name", ["rocm", "tpu", "xpu", "cpu"])
def test_other_families(name: str) -> None:
    platform = Platform.simulate(name)
    assert (platform.kind.value, platform.capability, platform.simulated) == (name, None, True)


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(AttentionBackendError, match=r"no simulated platform 'h200': one of sm75, sm80, sm89, sm90"):
        Platform.simulate("h200")


def test_what_is_simulated_has_packages_that_exist() -> None:
    assert all(set(platform.packages) <= set(PACKAGES) for platform in SIMULATED.values())


def test_without() -> None:
    hopper = Platform.simulate("sm90")
    bare = hopper.without("flash_attn_3", "flashinfer")
    assert set(hopper.packages) - set(bare.packages) == {"flash_attn_3", "flashinfer"}
    assert (bare.capability, bare.name) == (hopper.capability, hopper.name)


def test_installed_packages_are_found_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "attention.platform.PACKAGES",
        {"here": ("rich", "rich"), "nameless": ("json", "no-such-distribution"), "absent": ("no_such.module", "x")},
    )
    for module in [name for name in sys.modules if name == "rich" or name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, module)
    assert installed_packages() == {"here": importlib.metadata.version("rich"), "nameless": "unknown"}
    assert "rich" not in sys.modules


class TestDeviceSupport:
    def test_compute_capability_from_and_below(self) -> None:
        support = DeviceSupport(DeviceKind.CUDA, low=(9, 0), high=(10, 0))
        assert support.refuse(Platform.simulate("sm90")) == []
        assert support.refuse(Platform.simulate("sm89")) == ["needs SM 9.0 or newer, this is SM 8.9"]
        assert support.refuse(Platform.simulate("sm100")) == ["made for devices older than SM 10.0, this is SM 10.0"]

    def test_architecture(self) -> None:
        support = DeviceSupport(DeviceKind.ROCM, archs=("gfx942",))
        assert support.refuse(Platform.simulate("rocm")) == []
        old = Platform(DeviceKind.ROCM, "MI210", arch="gfx90a")
        assert support.refuse(old) == ["needs an architecture of gfx942, this is gfx90a"]

    def test_libraries(self) -> None:
        bare = Platform(DeviceKind.CUDA, "GPU", (9, 0), packages={"triton": "3"})
        assert DeviceSupport(DeviceKind.CUDA, packages=("triton", "flashinfer")).refuse(bare) == [
            "flashinfer-python is not installed"
        ]
        either = DeviceSupport(DeviceKind.CUDA, any_of=("flash_attn", "flash_attn_3"))
        assert either.refuse(bare) == ["none of flash-attn, flash-attn-3 is installed"]
        assert DeviceSupport(DeviceKind.CUDA, any_of=("flash_attn", "triton")).refuse(bare) == []

    def test_what_ran_on_one_architecture_did_not_run_on_the_others(self) -> None:
        support = DeviceSupport(DeviceKind.CUDA, low=(8, 0), ran_on=("SM 9.0",))
        found = {name: support.evidence(Platform.simulate(name)) for name in ("sm80", "sm89", "sm90", "sm100")}
        assert found == {name: Evidence.RAN if name == "sm90" else Evidence.ADAPTER for name in found}
        assert DeviceSupport(DeviceKind.CUDA).evidence(Platform.simulate("sm90")) is Evidence.ADAPTER

    def test_processors_are_told_apart(self) -> None:
        arm = Platform(DeviceKind.CPU, "CPU", arch="aarch64")
        for name in ("CPU_ATTN", "TORCH_SDPA", "CPU_MLA"):
            assert get_backend(name).capabilities.evidence(Platform.simulate("cpu")) is Evidence.RAN
            assert get_backend(name).capabilities.evidence(arm) is Evidence.ADAPTER

    @pytest.mark.parametrize("name", BACKENDS)
    def test_nothing_ran_where_no_test_ran(self, name: str) -> None:
        where = {
            key for key, there in SIMULATED.items() if get_backend(name).capabilities.evidence(there) is Evidence.RAN
        }
        assert where <= {"sm90", "cpu"}
