"""Checkpoints that say two things are read as transformers reads them, and a warning says so."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from local_cluster import LocalCluster
from workers.models.registry import read_model
from workers.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 100, 200, 300, 17, 400, 33] * 2
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str = "model.safetensors") -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def greedy(folder: Path) -> list[int]:
    cluster = LocalCluster(folder)
    cluster.submit("r", PROMPT, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, seed=0))
    return cluster.run()["r"]


@pytest.fixture
def copied(tiny_checkpoint, tmp_path) -> Callable[..., Path]:
    return lambda *args, **kwargs: Path(shutil.copytree(tiny_checkpoint(*args, **kwargs), tmp_path / "copy"))


def test_a_stored_output_matrix_that_differs_is_not_tied(copied, tiny_checkpoint, reference_greedy, caplog) -> None:
    folder = copied("qwen2", tie_word_embeddings=True)
    noise = torch.randn(load_file(folder / "model.safetensors")[EMBEDDING].shape, generator=torch.manual_seed(3))
    changed(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING] + 0.1 * noise}))
    with caplog.at_level(logging.WARNING):
        answer = greedy(folder)
    assert answer == reference_greedy(folder, PROMPT, 6)
    assert answer != greedy(tiny_checkpoint("qwen2", tie_word_embeddings=True))
    assert "tie_word_embeddings is true, but lm_head.weight is stored and differs" in caplog.text


def test_a_stored_output_matrix_that_is_the_embedding_is_tied(copied, caplog) -> None:
    folder = copied("qwen2", tie_word_embeddings=True)
    changed(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    assert read_model(folder)[1].tie_word_embeddings
    changed(folder, lambda weights: weights[HEAD][-1, -1].add_(1.0))
    assert not read_model(folder)[1].tie_word_embeddings


def test_a_single_file_is_read_and_not_the_shards_of_a_stale_index(
    copied, tiny_checkpoint, reference_greedy, caplog
) -> None:
    folder, other = copied("llama", max_shard_size="60KB"), tiny_checkpoint("llama", seed=1)
    shutil.copy(other / "model.safetensors", folder)
    with caplog.at_level(logging.WARNING):
        answer = greedy(folder)
    assert answer == greedy(other) == reference_greedy(folder, PROMPT, 6)
    assert "model.safetensors is read, and not the shards" in caplog.text


def test_both_rope_spellings_are_told(copied, caplog) -> None:
    folder = copied("llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        read_model(folder)
    assert "rope_scaling and rope_parameters differ: the first is used" in caplog.text
