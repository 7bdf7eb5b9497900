"""Every architecture that is registered has its rows: in the tests, among the published models, in docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from benchmarks.published_models import PUBLISHED
from tiny_families import FAMILIES
from workers.models.registry import ARCHITECTURES, model_class

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def test_every_architecture_has_a_tiny_family() -> None:
    """But for those of multi-modal checkpoints, whose text model has a row of its own."""
    of_text = {name for name in ARCHITECTURES if name.endswith("ForCausalLM")}
    assert {f"{family.prefix}ForCausalLM" for family in FAMILIES.values()} == of_text
    assert {name.replace("ForConditionalGeneration", "ForCausalLM") for name in ARCHITECTURES} == of_text


def test_every_architecture_has_a_published_model() -> None:
    assert set(PUBLISHED) == set(ARCHITECTURES)


def test_every_architecture_is_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == sorted(ARCHITECTURES)


def test_architectures_are_those_of_transformers() -> None:
    for architecture, family in ARCHITECTURES.items():
        theirs = getattr(transformers, architecture)
        assert theirs.config_class.model_type == family.model_type
        assert model_class(architecture).__name__ == architecture
