"""The scales of an FP8 KV cache: a checkpoint's, or 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention.backend import KVScales
from ranks import lone_rank
from workers.errors import CheckpointError, ConfigError
from workers.models.loader import load_model

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def with_tensors(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], Path]:
    """A checkpoint that holds more than its weights."""

    def make(more: dict[str, torch.Tensor]) -> Path:
        folder = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
        file = folder / "model.safetensors"
        save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
        return folder

    return make


def scales_of(folder: Path, kv_cache_dtype: str = "fp8") -> list[KVScales]:
    model = load_model(folder, kv_cache_dtype=kv_cache_dtype)
    return model.kv_scales


def test_without_any_they_are_one_and_stay_so(tiny_checkpoint: TinyCheckpoint, paged_run) -> None:
    model = load_model(tiny_checkpoint("llama"), kv_cache_dtype="fp8")
    paged_run(model, num_sequences=1, max_tokens=64).step({0: list(range(5, 40))})
    assert model.kv_scales == [KVScales()] * 3


@pytest.mark.parametrize(
    "spelling",
    [
        "self_attn.{}_scale",
        "self_attn.{}_proj.{}_scale",
        "self_attn.qkv_proj.{}_scale",
        "self_attn.attn.{}_scale",
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_checkpoints_own(with_tensors: Callable[..., Path], spelling: str, shape: tuple[int, ...]) -> None:
    values = {(0, "k"): 0.5, (0, "v"): 0.25, (2, "k"): 2.0, (2, "v"): 4.0}
    folder = with_tensors(
        {
            f"model.layers.{layer}.{spelling.replace('{}', kind)}": torch.full(shape, value)
            for (layer, kind), value in values.items()
        }
    )
    assert scales_of(folder) == [KVScales(0.5, 0.25), KVScales(), KVScales(2.0, 4.0)]
    assert scales_of(folder, "auto") == [KVScales()] * 3


def test_every_rank_has_the_checkpoints_own(with_tensors: Callable[..., Path]) -> None:
    values = (("k", 0.5), ("v", 2.0))
    folder = with_tensors({f"model.layers.1.self_attn.{kind}_scale": torch.tensor(value) for kind, value in values})
    for rank in range(2):
        model = load_model(folder, kv_cache_dtype="fp8", group=lone_rank(rank, 2))
        scales = model.kv_scales
        assert scales == [KVScales(), KVScales(0.5, 2.0), KVScales()]


def test_a_checkpoint_whose_cache_alone_is_quantized_loads(with_tensors: Callable[..., Path]) -> None:
    values = (("k", 0.5), ("v", 2.0))
    folder = with_tensors({f"model.layers.0.self_attn.{kind}_scale": torch.tensor(value) for kind, value in values})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    assert scales_of(folder)[0] == KVScales(0.5, 2.0)
    assert load_model(folder).kv_cache_groups[0].dtype == torch.float32


def test_they_change_what_is_stored_and_hardly_what_is_attended(with_tensors: Callable[..., Path], paged_run) -> None:
    scaled = with_tensors({f"model.layers.0.self_attn.{kind}_scale": torch.tensor(0.25) for kind in "kv"})
    ids, caches, logits = list(range(5, 40)), [], []
    for dtype in ("auto", "fp8"):
        run = paged_run(load_model(scaled, kv_cache_dtype=dtype), num_sequences=1, max_tokens=64)
        logits.append(run.step({0: ids})[0])
        caches.append(run.caches[0][0, run.tables[0][:2]].float())
    torch.testing.assert_close(caches[1], caches[0] / 0.25, rtol=0.07, atol=2e-2)
    assert float(torch.nn.functional.cosine_similarity(*logits).min()) > 0.97


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"k_scale": torch.tensor(0.5)}, r"layer 1 has model\.layers\.1\.self_attn\.k_scale but no v_scale"),
        ({"k_scale": torch.ones(2), "v_scale": torch.ones(1)}, r"k_scale has shape \(2,\), a scale is one number"),
        ({"k_scale": torch.ones(1), "v_scale": torch.zeros(1)}, r"v_scale is 0\.0, a scale is positive"),
        ({"k_scale": torch.ones(1), "v_scale": torch.tensor(float("inf"))}, r"v_scale is inf, a scale is positive"),
    ],
)
def test_what_makes_no_sense_is_refused(
    with_tensors: Callable[..., Path], more: dict[str, torch.Tensor], message: str
) -> None:
    folder = with_tensors({f"model.layers.1.self_attn.{name}": value for name, value in more.items()})
    with pytest.raises(CheckpointError, match=message) as error:
        scales_of(folder)
    assert str(folder / "model.safetensors") in str(error.value)


def test_a_scale_of_a_layer_that_is_not_there_has_no_place(with_tensors: Callable[..., Path]) -> None:
    folder = with_tensors({"model.layers.3.self_attn.k_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.k_scale has no place"):
        scales_of(folder)


def test_an_unknown_dtype_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype 'int4' is none of auto, fp8"):
        load_model(tiny_checkpoint("llama"), kv_cache_dtype="int4")
