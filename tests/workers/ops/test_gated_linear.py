"""SwiGLU of many rows in one kernel: when it is taken, and what a library that does not work costs."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from attention import broken
from workers.layers.context import LayerContext
from workers.layers.gated_mlp import GatedMLP
from workers.layers.linear_methods.plain import PlainLinear
from workers.ops import gated_linear as module
from workers.ops.gated_linear import fits, gated_linear, kernel_fault, usable
from workers.parallel.group import SINGLE

CPU = torch.device("cpu")
FEW = 40
needs_quack = pytest.mark.skipif(
    not torch.cuda.is_available() or not usable(torch.device("cuda", 0)), reason="needs quack on a Hopper GPU"
)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    return F.silu(gate) * up


def operands(rows: int, features: int, inputs: int, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator).bfloat16().to(device) for n in (rows, features))
    return x, weight / inputs**0.5


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, with small products."""
    monkeypatch.setattr(module, "ROWS", {(256, 128): (FEW, 2 * FEW), (1024, 512): (1, 8192)})


@pytest.mark.parametrize(("rows", "expected"), [(FEW - 1, False), (FEW, True), (2 * FEW, True), (2 * FEW + 1, False)])
def test_the_table_says_which_products(rows: int, expected: bool) -> None:
    x = torch.empty(rows, 128, dtype=torch.bfloat16)
    assert fits(x, torch.empty(256, 128, dtype=torch.bfloat16)) is expected
    assert not fits(x, torch.empty(512, 128, dtype=torch.bfloat16))


def test_other_dtypes_and_columns_that_are_apart_are_left_alone() -> None:
    x, weight = operands(FEW, 256, 128)
    assert fits(x, weight)
    assert not fits(x.float(), weight.float())
    assert not fits(x.t().contiguous().t(), weight)
    assert not fits(x, weight.t().contiguous().t())


def test_two_kernels_compute_it_where_there_is_no_library() -> None:
    x, weight = operands(FEW, 256, 128)
    assert not usable(CPU)
    assert gated_linear(x, weight) is None
    mlp = GatedMLP(128, 128, LayerContext(torch.bfloat16, CPU, SINGLE, PlainLinear()))
    mlp.gate_up_proj.get_parameter("weight").copy_(weight)
    torch.testing.assert_close(mlp.inner(x).double(), exact(x, weight), rtol=2e-2, atol=2e-2)


def test_a_kernel_is_tried_before_it_is_trusted() -> None:
    def right(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return exact(x, weight).to(x.dtype)

    def halves_swapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return right(x, torch.cat(weight.chunk(2)[::-1]))

    def refusing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise TypeError("no key for\nthat")

    assert kernel_fault(right, CPU) is None
    assert "wrong numbers" in (kernel_fault(halves_swapped, CPU) or "")
    assert kernel_fault(refusing, CPU) == "TypeError: no key for"


def test_a_library_that_does_not_work_is_reported_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(module, "installed_packages", lambda: {"quack": "0"})
    library = types.ModuleType("quack.gemm_interface")
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", library)
    broken.look_again()
    try:
        assert not usable.__wrapped__(torch.device("cuda", 0))
        assert broken.broken_libraries() == {"quack-kernels": "quack.gemm_interface is there without gemm_gated"}
        broken.look_again()
        library.gemm_gated = None  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "import_fault", lambda *_: None)
        monkeypatch.setattr(module, "kernel_fault", lambda *_: "wrong numbers")
        assert not usable.__wrapped__(torch.device("cuda", 0))
        assert broken.broken_libraries() == {"quack-kernels": "wrong numbers"}
    finally:
        broken.look_again()


@pytest.mark.gpu
@needs_quack
@pytest.mark.parametrize("rows", [1, 1500, 4097])
def test_on_a_gpu(rows: int) -> None:
    x, weight = operands(rows, 1024, 512, torch.device("cuda"))
    found = gated_linear(x, weight)
    assert found is not None
    torch.testing.assert_close(found.double(), exact(x, weight), rtol=1e-2, atol=1e-3)
    wide = torch.cat([x, x], dim=1)[:, 512:]
    again = gated_linear(wide, weight)
    assert again is not None
    assert torch.equal(again, found)
