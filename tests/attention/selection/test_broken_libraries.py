"""Libraries that are installed and broken: reported once, and what is next in the measured order takes their place."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention.backends.flash_attn.versions import choose_provider
from attention.broken import broken_libraries, look_again
from attention.errors import AttentionBackendError
from attention.platform import PACKAGES, DeviceKind, Platform, installed_packages
from attention.selection.priority import candidates
from attention.selection.selector import select_backend
from attention.spec import AttentionNeeds, AttentionSpec, Phase

SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)
PREFILL = AttentionNeeds(SPEC, torch.bfloat16, 64, Phase.PREFILL)
FLASHINFER, TRITON, VLLM, FA4 = "flashinfer", "triton", "vllm_flash_attn", "flash_attn_4"
NO_FA3 = "FA2_AVAILABLE = False\nFA3_AVAILABLE = False\ndef flash_attn_varlen_func(): ...\n"
WHOLE = NO_FA3.replace("False", "True")
INTERFACE = "flash_attn/cute/interface.py"

Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put modules where they are found: file name to text; folders get an empty `__init__`, but for flash_attn's."""
    tops = {module.partition(".")[0] for name, (module, _) in PACKAGES.items() if name != TRITON}
    for module in [name for name in sys.modules if name.partition(".")[0] in tops]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.parent.parent != tmp_path or file.parent.name != "flash_attn":
                (file.parent / "__init__.py").touch()
            file.write_text(text)

    yield write
    for module in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[module]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    look_again()
    yield
    look_again()


def h200(*packages: str) -> Platform:
    return Platform(DeviceKind.CUDA, "NVIDIA H200", (9, 0), packages=dict.fromkeys(packages, "1"))


def prefill(platform: Platform) -> str:
    return select_backend(platform, PREFILL).backend.name


HALF = [
    pytest.param({"vllm_flash_attn/flash_attn_interface.py": NO_FA3}, VLLM, "FA3_AVAILABLE", id="without-kernels"),
    pytest.param({"vllm_flash_attn/__init__.py": ""}, VLLM, "cannot be imported", id="without-module"),
    pytest.param({"vllm_flash_attn/flash_attn_interface.py": "FA3_AVAILABLE = True"}, VLLM, "_func", id="empty"),
    pytest.param({INTERFACE: "raise OSError('lib.so: undefined symbol')"}, FA4, "undefined", id="symbol"),
    pytest.param({INTERFACE: "import no_such_module"}, FA4, "no_such_module", id="dependency"),
]


@pytest.mark.parametrize(("files", "package", "reason"), HALF)
def test_a_broken_flash_attention_gives_its_place_to_flashinfer(
    files: dict[str, str], package: str, reason: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install({"flashinfer/__init__.py": "", **files})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert prefill(h200(package, FLASHINFER, TRITON)) == "FLASHINFER"
    generation = "FA3" if package == VLLM else "FA4"
    name = f"{generation} of {PACKAGES[package][1]}"
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith(name)]
    assert len(said) == 1
    assert reason in said[0]
    assert reason in broken_libraries()[name]


def test_a_whole_one_keeps_its_place(install: Install) -> None:
    install({"flashinfer/__init__.py": "", "vllm_flash_attn/flash_attn_interface.py": WHOLE})
    assert prefill(h200(VLLM, FLASHINFER)) == "FLASH_ATTN"
    install({INTERFACE: "def flash_attn_varlen_func(): ..."})
    assert str(choose_provider(h200(VLLM, FA4), SPEC)) == "FA4 of flash-attn-4"
    assert broken_libraries() == {}


def test_another_provider_of_the_same_kind_takes_the_place_of_a_broken_one(install: Install) -> None:
    install({INTERFACE: "import no_such_module", "vllm_flash_attn/flash_attn_interface.py": WHOLE})
    both = h200(VLLM, FA4, FLASHINFER)
    assert prefill(both) == "FLASH_ATTN"
    assert str(choose_provider(both, SPEC)) == "FA3 of vllm-flash-attn"
    assert list(broken_libraries()) == ["FA4 of flash-attn-4"]


def test_any_backends_library_is_looked_at_before_it_is_chosen(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install({"flashinfer/__init__.py": "import ctypes\nctypes.CDLL('no_such_library.so')"})
    with caplog.at_level(logging.WARNING):
        selection = select_backend(h200(FLASHINFER, TRITON), PREFILL)
    assert selection.backend.name == "TRITON_ATTN"
    (refused,) = (candidate for candidate in selection.candidates if candidate.name == "FLASHINFER")
    assert refused.reasons[0].startswith("flashinfer-python is broken: flashinfer cannot be imported: OSError")
    assert "flashinfer-python is installed and cannot be used" in caplog.text
    with pytest.raises(AttentionBackendError, match="FLASHINFER cannot run this model: flashinfer-python is broken"):
        select_backend(h200(FLASHINFER, TRITON), PREFILL, configured="FLASHINFER")


def test_nothing_is_imported_for_what_is_not_chosen(install: Install) -> None:
    install({"flashinfer/__init__.py": "", "xformers/__init__.py": "raise SystemExit('imported')"})
    assert prefill(h200(FLASHINFER, TRITON, "xformers")) == "FLASHINFER"
    assert "xformers" not in sys.modules


def test_a_described_platform_has_whole_libraries() -> None:
    described = replace(h200(FA4, FLASHINFER), simulated=True)
    assert candidates(described, PREFILL)[0] == "FLASH_ATTN"
    assert broken_libraries() == {}


def test_a_folder_that_distributions_share_is_no_library_of_its_own(install: Install) -> None:
    install({INTERFACE: "", "flash_attn/cute/__init__.py": ""})
    found = installed_packages()
    assert "flash_attn_4" in found
    assert "flash_attn" not in found
