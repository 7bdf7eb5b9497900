"""docs/adding-a-model.md: its Python runs, in the order of the page, and the family that it adds is right."""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.models.families.glm4 import Glm4ForCausalLM
from workers.models.loader import load_model

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-model.md"


@pytest.fixture(scope="module")
def page() -> Iterator[types.ModuleType]:
    """A module made of the page's Python blocks, in the place of the module that the registry names."""
    module = types.ModuleType("adding_a_model_page")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "adding_a_model_page", module)
        patched.setitem(sys.modules, "workers.models.families.granite", module)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), module.__dict__)
        yield module


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_the_new_family_is_right(
    page: types.ModuleType,
    overrides: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    reference: Any,
    paged_run: Any,
) -> None:
    folder = tiny_checkpoint("granite", **overrides)
    model = load_model(folder, dtype="float32")
    assert type(model) is page.GraniteForCausalLM
    ids = [random.Random(0).randrange(3, 500) for _ in range(40)]
    run = paged_run(model, num_sequences=1, max_tokens=64)
    ours = torch.cat([run.step({0: ids[:25]})[0], run.step({0: ids[25:]})[0]])
    expected = reference(folder).logits(ids)
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), rtol=1e-4, atol=2e-4)


def test_the_pages_layer_is_glm4s(
    page: types.ModuleType,
    tiny_checkpoint: Callable[..., Path],
    reference: Any,
    paged_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make_layer(self: Any, index: int, *of_layer: Any) -> torch.nn.Module:
        return page.FourNormsLayer(self.config, *of_layer, self.context)

    monkeypatch.setattr(Glm4ForCausalLM, "make_layer", make_layer)
    folder = tiny_checkpoint("glm4")
    run = paged_run(load_model(folder, dtype="float32"), num_sequences=1, max_tokens=32)
    ids = list(range(3, 30))
    (ours,) = run.step({0: ids})
    expected = reference(folder).logits(ids)
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), rtol=1e-4, atol=2e-4)


def test_the_page_shows_the_family_that_is_there(page: types.ModuleType, tiny_checkpoint: Callable[..., Path]) -> None:
    shown = dataclasses.asdict(page.model.config)
    assert shown == dataclasses.asdict(page.config) | {"dtype": "float32"}
    text, source = PAGE.read_text(encoding="utf-8"), Path(PAGE.parents[1], "workers/models/families/granite.py")
    for part in source.read_text(encoding="utf-8").split('"""\n\n', 1)[1].split("\n\n\n"):
        assert part.strip() in text
