"""What is Gemma's own: norms of 1 + w, a rounded scale of embeddings, a text model inside a multi-modal checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from workers.errors import CheckpointError
from workers.models.loader import load_model
from workers.models.registry import parse_model

TinyCheckpoint = Callable[..., Path]
IDS = random.Random(0).choices(range(3, 500), k=50)
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def multi_modal(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoint) -> Path:
    """The text model of `tiny_checkpoint("gemma3")` inside a multi-modal one, as transformers saves it."""
    text = json.loads((tiny_checkpoint("gemma3") / "config.json").read_text())
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_id=511)
    model = transformers.Gemma3ForConditionalGeneration(config)
    own = load_file(tiny_checkpoint("gemma3") / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            parameter.copy_(own[f"model.{name}"])
    folder = tmp_path_factory.mktemp("gemma3-multi-modal")
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, paged_run: Any, **settings: Any) -> torch.Tensor:
    run = paged_run(load_model(folder, **{"dtype": "float32", **settings}), num_sequences=1, max_tokens=64)
    return torch.cat([run.step({0: IDS[:30]})[0], run.step({0: IDS[30:]})[0]])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_multi_modal_checkpoint(
    multi_modal: Path, tiny_checkpoint: TinyCheckpoint, paged_run: Any, tmp_path: Path, prefix: str
) -> None:
    """In both spellings of names; whatever has no place in the model is still refused."""
    folder = shutil.copytree(multi_modal, tmp_path / "spelled")
    saved = load_file(folder / "model.safetensors")
    spelled = {
        name.replace("language_model.model.", prefix).replace("model.language_model.", prefix): tensor
        for name, tensor in saved.items()
    }
    assert any(name.startswith(prefix) for name in spelled)
    assert any("vision_tower" in name for name in spelled)
    save_file(spelled, folder / "model.safetensors")
    assert torch.equal(logits(folder, paged_run), logits(tiny_checkpoint("gemma3"), paged_run))
    save_file({**spelled, "audio_tower.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"audio_tower\.weight has no place"):
        load_model(folder)


def test_a_multi_modal_config_leaves_out_what_is_a_default() -> None:
    """As that of gemma-3-4b-it does, even its numbers of heads and tokens."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    stated = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16",
        "text_config": {**text, "model_type": "gemma3_text", "rope_scaling": scaling},
    }
    config = parse_model(stated)[1]
    theirs = transformers.Gemma3Config(text_config=dict(stated["text_config"])).text_config
    assert (config.vocab_size, config.max_position_embeddings) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert (config.num_layers, config.hidden_size, config.dtype) == (34, 2560, "bfloat16")
    assert config.eos_token_ids == (1, 106)
    assert config.tie_word_embeddings
    assert config.logits_soft_cap is None
    for layer, kind in zip(config.attention, theirs.layer_types, strict=True):
        assert (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.scale) == (8, 4, 256, 1 / 16)
        assert layer.sliding_window == (1024 if kind == "sliding_attention" else None)
        assert layer.rope is not None
        assert layer.rope.theta == (1e4 if kind == "sliding_attention" else 1e6)
        assert (layer.rope.scaling is None) == (kind == "sliding_attention")
    with pytest.raises(CheckpointError, match=r"text_config\.num_kv_shared_layers: 3 is not supported: layers that"):
        parse_model({**stated, "text_config": {**text, "num_kv_shared_layers": 3}})
    with pytest.raises(CheckpointError, match="text_config: must be an object, not None"):
        parse_model({**stated, "text_config": None})
    with pytest.raises(CheckpointError, match=r"text_config\.hidden_size: must be at least 1, not 0"):
        parse_model({**stated, "text_config": {**text, "hidden_size": 0}})


def test_what_gemma2_takes_for_what_is_absent() -> None:
    """Defaults of transformers; a null is another thing."""
    config = parse_model(GEMMA2)[1]
    assert (config.logits_soft_cap, config.tie_word_embeddings) == (30.0, True)
    assert [layer.soft_cap for layer in config.attention] == [50.0] * 26
    assert [layer.sliding_window for layer in config.attention] == [4096, None] * 13
    bare = parse_model({**GEMMA2, "final_logit_softcapping": None, "attn_logit_softcapping": None})[1]
    assert (bare.logits_soft_cap, bare.attention[0].soft_cap) == (None, None)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: must be null or a number above"),
        ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation: activation 'relu' is none of"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar: must be a number above 0"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ("Gemma3ForCausalLM", {"layer_types": ["linear_attention"] * 26}, "layer_types: 'linear_attention' is not"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(architecture: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_model({**GEMMA2, "architectures": [architecture], **change})


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_bfloat16_rounds_as_transformers_does(
    tiny_checkpoint: TinyCheckpoint, paged_run: Any, tmp_path: Path, family: str
) -> None:
    """Norms of 1 + w in float32, w being too small for bfloat16 beside 1, and sqrt(hidden size) in bfloat16."""
    folder = shutil.copytree(tiny_checkpoint(family, hidden_size=72, num_hidden_layers=2), tmp_path / family)
    stored = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in stored.items()}, folder / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    model = load_model(folder, dtype="bfloat16")
    with torch.inference_mode():
        expected = theirs.model.embed_tokens(torch.tensor(IDS))
        embedded = model.embed(torch.tensor(IDS))
        normed = theirs.model.layers[0].input_layernorm(expected)
        assert torch.equal(embedded, expected)
        assert torch.equal(model.layers[0].input_norm(embedded), normed)
        wanted = theirs(torch.tensor([IDS])).logits[0].float()
    agreement = torch.nn.functional.cosine_similarity(logits(folder, paged_run, dtype="bfloat16"), wanted, dim=-1)
    assert float(agreement.min()) > 0.99


def test_random_norms_multiply_by_one(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_model(tiny_checkpoint("gemma3"), "bfloat16", load_format="dummy")
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    assert len(norms) == 3 * 5 + 1
    assert all(norm.dtype == torch.float32 and bool((norm == 1).all()) for norm in norms)
