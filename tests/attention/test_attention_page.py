"""docs/attention.md: its Python runs, in the order of the page, and its new backend is right."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention.platform import Platform
from attention.selection.measure import measure
from attention.selection.measurements import Shape
from attention.selection.registry import BACKENDS
from attention.selection.selector import force_attn_backend, select_backend, unsupported_reasons
from attention.spec import AttentionNeeds, AttentionSpec, Feature, Phase

PAGE = Path(__file__).parents[2] / "docs" / "attention.md"
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)
NEEDS = AttentionNeeds(SPEC, torch.float32, 16, features=frozenset({Feature.PREFIX}))


@pytest.fixture(scope="module")
def page() -> Iterator[types.ModuleType]:
    """A module made of the page's Python blocks."""
    module = types.ModuleType("attention_page")
    sys.modules["attention_page"] = module
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules["attention_page"]


@pytest.fixture
def registered(page: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    names = {**BACKENDS, "PLAIN_ATTN": "attention_page:PlainBackend"}
    monkeypatch.setattr("attention.selection.registry.BACKENDS", names)
    return page


def test_the_batches_of_the_page(page: types.ModuleType) -> None:
    assert page.output.shape == (1, 8, 64)
    assert page.sent == ["layers.0", "layers.1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_new_backend_is_right(
    registered: types.ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.selection.measure.candidates", lambda *_: ("PLAIN_ATTN",))
    shapes = {phase: (Shape(1, 1, 8),) for phase in Phase}
    cpu = torch.device("cpu")
    record = measure(Platform.of(cpu), cpu, replace(NEEDS, dtype=dtype), shapes)
    assert record.excluded == ()
    assert [m.backend for m in record.measurements] == ["PLAIN_ATTN"] * 2


def test_the_new_backend_can_be_chosen_and_refuses(registered: types.ModuleType) -> None:
    cpu = Platform.of("cpu")
    with force_attn_backend("PLAIN_ATTN"):
        assert select_backend(cpu, NEEDS).backend is registered.PlainBackend
    assert unsupported_reasons("PLAIN_ATTN", cpu, [replace(NEEDS, spec=replace(SPEC, has_sinks=True))]) == [
        "PyTorch's operator gives no log-sum-exp to add them to"
    ]
    assert unsupported_reasons("PLAIN_ATTN", cpu, [replace(NEEDS, spec=replace(SPEC, head_size=20))]) == [
        "head size 20 is not one of: 8 to 256, multiples of 8"
    ]
