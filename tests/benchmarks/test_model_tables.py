"""The table of docs/models.md, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attention.spec import MLASpec
from benchmarks import model_tables
from benchmarks.model_tables import cache_groups, kv_bytes_per_token
from benchmarks.published_models import PUBLISHED
from workers.errors import ConfigError
from workers.models.config.model_config import ModelConfig
from workers.models.registry import parse_model


def published(architecture: str) -> ModelConfig:
    return parse_model({**PUBLISHED[architecture].config, "architectures": [architecture]})[1]


def test_bytes_of_a_token() -> None:
    assert kv_bytes_per_token(published("LlamaForCausalLM").attention) == 32 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(published("Olmo2ForCausalLM").attention) == 32 * 2 * 32 * 128 * 2
    layer = published("LlamaForCausalLM").attention[0]
    latent = replace(layer, num_heads=16, num_kv_heads=1, head_size=576, mla=MLASpec(512, 128, 64, 128))
    assert kv_bytes_per_token((latent,) * 27) == 27 * 576 * 2


def test_layers_that_keep_the_same_are_a_group() -> None:
    assert cache_groups(published("Cohere2ForCausalLM")) == {"full": 8, "sliding (4096)": 24}
    assert cache_groups(published("MistralForCausalLM")) == {"sliding (4096)": 32}


def test_rows(tmp_path: Path) -> None:
    table = model_tables.models(tmp_path)
    assert "| whole heads, in pairs in 24 layers; none in 8 layers | 8 full, 24 sliding (4096) |" in table
    assert "| 131,072 | 32,768 |" in table
    assert "| GQA, 32 over 2 heads of 128 | 50%, in pairs | 40 full |" in table


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_tables, "PUBLISHED", {k: v for k, v in PUBLISHED.items() if k != "GlmForCausalLM"})
    with pytest.raises(ConfigError, match=r"published_models\.py has no GlmForCausalLM"):
        model_tables.models(tmp_path)
