"""The hardware and software that a backend would run on: this machine's, or one described by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

import torch

from attention.errors import AttentionBackendError


class DeviceKind(StrEnum):
    """Families of hardware, as backends tell them apart."""

    CPU = "cpu"
    CUDA = "cuda"
    ROCM = "rocm"
    TPU = "tpu"
    XPU = "xpu"


PACKAGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "triton": ("triton", "triton"),
        "flashinfer": ("flashinfer", "flashinfer-python"),
        "flash_attn": ("flash_attn", "flash-attn"),
        "flash_attn_3": ("flash_attn_interface", "flash-attn-3"),
        "flash_attn_4": ("flash_attn.cute", "flash-attn-4"),
        "quack": ("quack", "quack-kernels"),
        "vllm_flash_attn": ("vllm_flash_attn", "vllm-flash-attn"),
        "flash_mla": ("flash_mla", "flash-mla"),
        "xformers": ("xformers", "xformers"),
        "aiter": ("aiter", "amd-aiter"),
        "jax": ("jax", "jax"),
        "torch_xla": ("torch_xla", "torch-xla"),
        "intel_extension_for_pytorch": ("intel_extension_for_pytorch", "intel-extension-for-pytorch"),
    }
)
"""Kernel libraries that attention backends and layers ask for: name to (module, distribution)."""


@dataclass(frozen=True)
class Platform:
    """A device and the kernel libraries beside it.

    Attributes:
        kind: the family.
        name: what people call it.
        capability: CUDA's compute capability, such as (9, 0); None elsewhere.
        arch: the architecture's own name where it has one ("gfx942", "x86_64").
        packages: installed kernel libraries, name to version.
        triton_interpreter: whether Triton kernels are interpreted on the CPU instead of compiled.
        simulated: whether this is a description: all libraries that exist for the family count as installed.
    """

    kind: DeviceKind
    name: str
    capability: tuple[int, int] | None = None
    arch: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    triton_interpreter: bool = False
    simulated: bool = False

    @property
    def sm(self) -> str | None:
        """The compute capability as NVIDIA writes it, "SM 9.0"; None elsewhere."""
        return f"SM {self.capability[0]}.{self.capability[1]}" if self.capability else None

    @property
    def architecture(self) -> str | None:
        """What kernels are compiled for: "SM 9.0", "gfx942", "x86_64"; None where it is not told apart."""
        return self.sm or self.arch

    def lacks(self, dtype: torch.dtype) -> str | None:
        """Why no kernel computes in that dtype there; None where some do."""
        if dtype is torch.bfloat16 and self.capability is not None and self.capability < (8, 0):
            return f"bfloat16 needs SM 8.0 or newer, this is {self.sm}"
        return None

    def __str__(self) -> str:
        detail = None if self.kind is DeviceKind.CPU else self.architecture
        return f"{self.name} ({detail})" if detail else self.name

    @classmethod
    def of(cls, device: torch.device | str) -> Platform:
        """The platform of a device of this machine.

        Raises:
            AttentionBackendError: the device's family is not known.
        """
        device = torch.device(device)
        packages = installed_packages()
        if device.type == "cpu":
            interpreted = "triton" in packages and _triton_interpreted()
            arch = platform.machine()
            return cls(DeviceKind.CPU, "CPU", arch=arch, packages=packages, triton_interpreter=interpreted)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            if torch.version.hip is not None:
                arch = str(properties.gcnArchName).split(":")[0]
                return cls(DeviceKind.ROCM, properties.name, arch=arch, packages=packages)
            capability = (properties.major, properties.minor)
            return cls(DeviceKind.CUDA, properties.name, capability=capability, packages=packages)
        if device.type == "xpu":
            return cls(DeviceKind.XPU, torch.xpu.get_device_name(device), packages=packages)
        if device.type == "xla":
            return cls(DeviceKind.TPU, "TPU", packages=packages)
        raise AttentionBackendError(f"device {device}: no attention backend knows devices of type {device.type}")

    @classmethod
    def simulate(cls, name: str) -> Platform:
        """A platform by name, with every kernel library of its family.

        Raises:
            AttentionBackendError: no such name; the text lists the right ones.
        """
        if name not in SIMULATED:
            raise AttentionBackendError(f"no simulated platform {name!r}: one of {', '.join(SIMULATED)}")
        return SIMULATED[name]

    def without(self, *packages: str) -> Platform:
        """The same platform with these libraries missing."""
        return replace(self, packages={name: v for name, v in self.packages.items() if name not in packages})


def installed_packages() -> dict[str, str]:
    """The kernel libraries of `PACKAGES` that can be imported here, with their versions. Imports none of them."""
    found = {}
    for name, (module, distribution) in PACKAGES.items():
        try:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:  # a folder without code: other distributions put parts into it
                continue
        except ImportError:
            continue
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _triton_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Triton takes long to import, and is not where nothing can say so."""
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


_CUDA_PACKAGES = ("triton", "flashinfer", "flash_attn", "xformers", "flash_mla")


def _cuda(name: str, major: int, minor: int, *more: str) -> Platform:
    packages = dict.fromkeys((*_CUDA_PACKAGES, *more), "any")
    return Platform(DeviceKind.CUDA, name, (major, minor), packages=packages, simulated=True)


SIMULATED: Mapping[str, Platform] = MappingProxyType(
    {
        "sm75": _cuda("Tesla T4", 7, 5),
        "sm80": _cuda("A100", 8, 0),
        "sm89": _cuda("L40S", 8, 9),
        "sm90": _cuda("H100/H200", 9, 0, "flash_attn_3", "flash_attn_4"),
        "sm100": _cuda("B200", 10, 0, "flash_attn_4"),
        "rocm": Platform(
            DeviceKind.ROCM, "MI300X", arch="gfx942", packages={"triton": "any", "aiter": "any"}, simulated=True
        ),
        "tpu": Platform(DeviceKind.TPU, "TPU", packages={"jax": "any", "torch_xla": "any"}, simulated=True),
        "xpu": Platform(
            DeviceKind.XPU,
            "Intel GPU",
            packages={"triton": "any", "intel_extension_for_pytorch": "any"},
            simulated=True,
        ),
        "cpu": Platform(DeviceKind.CPU, "CPU", arch="x86_64", simulated=True),
    }
)
"""Platforms by the name that `baton backends --simulate` takes."""
