from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.errors import CheckpointError, ConfigError
from workers.loading.checkpoint import resolve_checkpoint, stored_tensors
from workers.models.loader import load_model

TinyCheckpoint = Callable[..., Path]
PROMPT = list(range(5, 40))


@pytest.fixture
def copied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    source = tiny_checkpoint("llama", max_shard_size="100KB")
    return Path(shutil.copytree(source, tmp_path / "sharded"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    return str(error.value)


def test_shards_load_as_one_file_does(tiny_checkpoint: TinyCheckpoint, sharded: Path, paged_run: Any) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    models = [load_model(folder, dtype="float32") for folder in (tiny_checkpoint("llama"), sharded)]
    logits = [paged_run(model, num_sequences=1, max_tokens=64).step({0: PROMPT})[0] for model in models]
    assert torch.equal(logits[0], logits[1])


def test_progress_grows_to_the_size_of_the_weights(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(sharded, progress=lambda done, total: calls.append((done, total)))
    total = sum(stored.nbytes for stored in stored_tensors(sharded))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {t for _, t in calls} == {total}
    assert calls[-1] == (total, total)
    assert len(calls) > 10


def test_random_weights_need_only_the_config(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, paged_run: Any) -> None:
    shutil.copy(tiny_checkpoint("qwen3") / "config.json", tmp_path)

    def logits(seed: int) -> torch.Tensor:
        model = load_model(tmp_path, dtype="float32", load_format="dummy", seed=seed)
        out: torch.Tensor = paged_run(model, num_sequences=1, max_tokens=64).step({0: PROMPT})[0]
        return out

    assert torch.isfinite(logits(1)).all()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_auto_takes_the_dtype_of_the_checkpoint(copied: Path) -> None:
    assert load_model(copied).dtype == torch.float32
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_model(copied).dtype == torch.bfloat16
    assert load_model(copied, dtype="float16").dtype == torch.float16


def test_an_old_checkpoint_with_inverse_frequencies_loads(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(copied)


def test_a_tied_checkpoint_may_hold_its_head_again(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("qwen2", tie_word_embeddings=True), tmp_path / "tied"))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    load_model(folder)


@pytest.mark.parametrize(("keep", "name"), [(0.5, "data"), (4, "header")])
def test_a_truncated_file_is_named(copied: Path, keep: float, name: str) -> None:
    file = copied / "model.safetensors"
    size = int(keep) if keep >= 1 else int(file.stat().st_size * keep)
    file.write_bytes(file.read_bytes()[:size])
    assert refusal(copied).startswith(f"{file} is truncated or not a safetensors file"), name


def test_a_pointer_of_git_lfs_says_what_to_do(copied: Path) -> None:
    file = next(copied.glob("*.safetensors"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(copied) == f"{file} is a pointer of Git LFS and not the weights; fetch them with `git lfs pull`"


def test_a_missing_tensor_is_named(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(copied)
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in message
    assert str(copied / "model.safetensors") in message


def test_a_misshapen_tensor_is_named(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    message = refusal(copied)
    assert "tensor model.norm.weight has shape (65,) where (64,) is expected" in message
    assert str(copied / "model.safetensors") in message


def test_a_tensor_that_would_be_ignored_is_refused(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    assert "tensor model.layers.0.self_attn.q_proj.bias has no place in a llama model" in refusal(copied)


def test_integer_weights_are_refused(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "model.norm.weight has dtype I8, it must be one of F64" in refusal(copied)


def test_no_weights_at_all(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refusal(copied)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in refusal(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [({"weight_map": {"a": "../../secret.safetensors"}}, "not a file name"), ({}, "weight_map must map")],
)
def test_a_bad_index_is_refused(sharded: Path, index: dict[str, Any], message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(sharded)


def test_a_local_folder_is_taken_as_it_is(copied: Path) -> None:
    assert resolve_checkpoint(str(copied)) == copied


def test_what_is_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_checkpoint(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve_checkpoint(str(tmp_path / "file"))


def test_the_hub(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        assert "*.json" in allow_patterns
        if repo_id == "owner/absent":
            raise OSError("Repository Not Found\nfor url …")
        return str(copied)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_checkpoint("owner/present") == copied
    with pytest.raises(CheckpointError, match=r"'owner/absent' is no local folder.*Repository Not Found$"):
        resolve_checkpoint("owner/absent")
    assert asked == ["owner/present", "owner/absent"]


def test_wrong_settings_are_configuration_errors(copied: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'float8' is none of auto, float32"):
        load_model(copied, dtype="float8")
    with pytest.raises(ConfigError, match="load_format 'npz'"):
        load_model(copied, load_format="npz")
    with pytest.raises(ConfigError, match="did you mean CPU_ATTN"):
        load_model(copied, backend_name="CPU_ATN")
