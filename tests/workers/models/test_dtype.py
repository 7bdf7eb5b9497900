"""The dtype that a model runs in: the checkpoint's own where nothing is said, and what the device has instead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attention.errors import AttentionBackendError
from attention.platform import SIMULATED, Platform
from attention.selection.selector import select_backend
from attention.spec import AttentionNeeds, AttentionSpec
from workers.errors import ConfigError
from workers.models import loader
from workers.models.loader import load_model, resolve_dtype

WITHOUT = ("sm75",)
"""Platforms that have no bfloat16."""


@pytest.mark.parametrize("name", SIMULATED)
def test_a_bfloat16_checkpoint_runs_in_float16_where_there_is_no_bfloat16(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dtype = resolve_dtype("auto", "bfloat16", Platform.simulate(name))
    assert dtype is (torch.float16 if name in WITHOUT else torch.bfloat16)
    assert ("running it in float16" in caplog.text) is (name in WITHOUT)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_checkpoints_stay_as_they_are(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("auto", dtype, Platform.simulate("sm75")) is getattr(torch, dtype)
    assert not caplog.text


def test_what_is_named_is_taken_and_refused_with_the_reason() -> None:
    platform = Platform.simulate("sm75")
    dtype = resolve_dtype("bfloat16", "bfloat16", platform)
    assert dtype is torch.bfloat16
    with pytest.raises(AttentionBackendError, match=r"bfloat16 needs SM 8\.0 or newer, this is SM 7\.5"):
        select_backend(platform, AttentionNeeds(AttentionSpec(8, 2, 64, 0.125), dtype, 16))


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype 'int8' is none of auto, float32, bfloat16, float16"):
        resolve_dtype("int8", "bfloat16")


def test_a_model_is_loaded_in_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (tiny_checkpoint("llama") / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (tmp_path / "config.json").write_text(config)
    turing = SimpleNamespace(of=lambda _: Platform.simulate("sm75"))
    monkeypatch.setattr(loader, "Platform", turing)
    decoder = load_model(tmp_path, load_format="dummy")
    assert decoder.dtype is decoder.kv_cache_groups[0].dtype is torch.float16
    monkeypatch.undo()
    assert load_model(tmp_path, load_format="dummy").dtype is torch.bfloat16
