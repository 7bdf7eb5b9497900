"""Whose KV cache a worker keeps: what is alike must be, and what is not must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_transfer.identity import KVIdentity
from workers.loading.weight_digest import weight_digest
from workers.models.loader import load_model

TinyCheckpoint = Callable[..., Path]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 32.0,
}


def identity(folder: Path, **settings: Any) -> KVIdentity:
    return load_model(folder, **{"dtype": "float32", **settings}).identity


def parts(one: KVIdentity, other: KVIdentity) -> list[str]:
    return [difference.split(" ")[0] for difference in one.differences(other)]


@pytest.fixture
def copy(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy"))


def change_one_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"][5, 7] += 1e-4
    save_file(weights, file, metadata={"format": "pt"})


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def change_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (change_one_weight, "weights"),
        (change_json("config.json", rope_theta=5000.0, rope_parameters=None), "config"),
        (change_json("config.json", rms_norm_eps=1e-3), "config"),
        (change_tokenizer, "tokenizer"),
    ],
)
def test_what_changes_the_meaning_changes_the_identity(
    change: Callable[[Path], None], part: str, copy: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    before = identity(copy)
    assert before == identity(tiny_checkpoint("llama")), "a copy is the same"
    change(copy)
    assert parts(before, identity(copy)) == [part]


def test_dtype_and_scales_of_the_cache_are_of_it(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    assert parts(identity(folder), identity(folder, dtype="bfloat16")) == ["weights", "dtype"]
    assert parts(identity(folder), identity(folder, kv_cache_dtype="fp8")) == ["kv_scales"]


def test_what_is_no_part_of_the_meaning_is_not(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    other = identity(folder, block_size=32, backend_name="TORCH_SDPA", max_model_len=128)
    assert identity(folder) == other
    assert identity(folder).digest == other.digest


def test_frequencies_that_follow_the_context_are_of_it(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama", rope_parameters=_LONGROPE)
    assert identity(folder, max_model_len=128) == identity(folder, max_model_len=256)
    assert parts(identity(folder, max_model_len=32), identity(folder, max_model_len=128)) == ["config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_number_in_any_place_counts(dtype: torch.dtype) -> None:
    tensor = torch.arange(103).to(dtype)
    digests = {weight_digest([("w", tensor)])}
    for place in (0, 50, 102):
        changed = tensor.clone()
        changed[place] = 111
        digests.add(weight_digest([("w", changed)]))
    digests |= {weight_digest([("w", tensor.flip(0))]), weight_digest([("v", tensor)])}
    digests |= {weight_digest([("w", tensor[:, None])]), weight_digest([("w", tensor[:96])])}
    assert len(digests) == 8
    assert weight_digest([("a", tensor), ("w", tensor)]) == weight_digest([("w", tensor), ("a", tensor)])


def test_words_far_apart_may_not_change_places() -> None:
    tensor = torch.zeros(2**20 + 8, dtype=torch.int64)
    tensor[3] = 1
    moved = torch.zeros_like(tensor)
    moved[2**20 + 3] = 1
    assert weight_digest([("w", tensor)]) != weight_digest([("w", moved)])
