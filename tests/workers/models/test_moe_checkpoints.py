"""Models with experts out of checkpoints in every form that these are stored in, and configs that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ranks import lone_rank
from tiny_families import COMMON, FAMILIES
from workers.errors import CheckpointError, ConfigError
from workers.models.families.llama4 import Llama4TextConfig
from workers.models.loader import load_model
from workers.models.registry import parse_model

TinyCheckpoint = Callable[..., Path]
MIXTURES = ("gpt_oss", "llama4", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as they are loaded."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def parameters(folder: Path, rank: int = 0, size: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, group=lone_rank(rank, size), **settings).named_parameters())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_as_transformers_keeps_them(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str) -> None:
    """`save_pretrained(save_original_format=False)` names and stacks them as the modules of transformers do."""
    folder = tiny_checkpoint(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    published, renamed = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert "model.layers.0.mlp.experts.gate_up_proj" in renamed.keys() - published.keys()
    for rank, size in ((0, 1), (1, 2)):
        assert_same(parameters(folder, rank, size), parameters(tmp_path, rank, size))


def test_a_checkpoint_of_two_forms_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(8, 64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj has no place"):
        load_model(tmp_path)


def test_mxfp4_is_what_transformers_makes_of_it(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("gpt_oss")
    plain, packed = tmp_path / "plain", tmp_path / "mxfp4"
    numbers = load_file(folder / "model.safetensors")
    stored, generator = dict(numbers), torch.Generator().manual_seed(0)
    for name, tensor in numbers.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, inputs, outputs = tensor.shape
            shape = (num_experts, outputs, inputs // 32, 16)
            blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 124, shape[:-1], dtype=torch.uint8, generator=generator)
            numbers[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    for each, tensors, more in ((plain, numbers, {}), (packed, stored, {"quantization_config": quantization})):
        each.mkdir()
        save_file(tensors, each / "model.safetensors")
        (each / "config.json").write_text(json.dumps({**config, **more}))
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        assert_same(parameters(plain, rank, size), parameters(packed, rank, size))
    (plain / "config.json").write_text((packed / "config.json").read_text())
    assert_same(parameters(plain), parameters(packed))  # the file says in what form it is
    dummy = parameters(packed, load_format="dummy")["layers.1.mlp.experts.down_proj.weight"]
    assert float(dummy.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_llama_4_that_reads_images(tmp_path: Path, paged_run: Any, spelling: str) -> None:
    row = FAMILIES["llama4"]
    text = {**COMMON, **row.settings}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28}
    config = transformers.Llama4Config(text_config=text, vision_config={**vision, **sizes})
    torch.manual_seed(0)
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("vision_model.") for name in tensors)
    renamed = {name.replace("language_model.model.", spelling): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    ids = [(7 * i) % 480 + 3 for i in range(70)]
    with torch.inference_mode():
        expected = model.language_model(torch.tensor([ids])).logits[0]
    loaded = load_model(tmp_path, dtype="float32")
    assert type(loaded).__name__ == "Llama4ForConditionalGeneration"
    (ours,) = paged_run(loaded, num_sequences=1, max_tokens=80).step({0: ids})
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("size", [2, 4])
def test_random_experts_are_shards_of_one_model(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, family: str, size: int
) -> None:
    monkeypatch.setattr("workers.models.random_weights.CHUNK_ELEMENTS", 1000)
    folder, name = tiny_checkpoint(family), "layers.1.mlp.experts.{}.weight"
    settings: dict[str, Any] = {"dtype": "float32", "load_format": "dummy", "seed": 5}
    whole, shards = parameters(folder, **settings), [parameters(folder, i, size, **settings) for i in range(size)]
    gate_up, down = name.format("gate_up_proj"), name.format("down_proj")
    assert float(whole[gate_up].std()) == pytest.approx(0.02, rel=0.05)
    halves = zip(*(shard[gate_up].chunk(2, dim=1) for shard in shards), strict=True)
    assert torch.equal(torch.cat([torch.cat(half, dim=1) for half in halves], dim=1), whole[gate_up])
    assert torch.equal(torch.cat([shard[down] for shard in shards], dim=2), whole[down])


def test_a_model_says_what_a_token_goes_through_and_what_ranks_share_out(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen2_moe", decoder_sparse_step=2)
    config = load_model(folder, load_format="dummy").config
    assert config.intermediate_size == 3 * 32 + 64
    assert sorted(config.shared_out().values()) == [32, 64, 96]
    with pytest.raises(ConfigError, match="does not divide the model's experts' intermediate size, which is 30"):
        load_model(tiny_checkpoint("qwen3_moe", moe_intermediate_size=30), group=lone_rank(0, 4))


def test_blocks_that_straddle_chunks_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(ConfigError, match="block_size is 64, and does not divide the model's attention chunks of 32"):
        load_model(tiny_checkpoint("llama4"), block_size=64)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "'awq': checkpoints with quantized weights"),
        ("gpt_oss", {"quantization_config": {"quant_method": 4}}, "quant_method: must be a name, not 4"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4': checkpoints with quantized"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' is not supported"),
        ("llama4", {"attention_chunk_size": None}, "attention_chunk_size: is null, and layer_types has"),
        ("llama4", {"moe_layers": [4]}, "moe_layers: names layer 4 of 4"),
        ("llama4", {"attn_temperature_tuning": "yes"}, "attn_temperature_tuning: must be true or false"),
        ("llama4", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "use_qk_norm: true is not supported"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts: is missing"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok: must be at most the 4 experts, not 5"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size: is missing"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: must be at least 1, not 0"),
    ],
)
def test_what_is_not_computed_is_refused(
    tiny_checkpoint: TinyCheckpoint, family: str, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((tiny_checkpoint(family) / "config.json").read_text())
    parse_model(config)
    with pytest.raises(CheckpointError, match=message):
        parse_model({**config, **changes})


def test_old_llama_4_configs_number_their_tuning(tiny_checkpoint: TinyCheckpoint) -> None:
    config = json.loads((tiny_checkpoint("llama4") / "config.json").read_text())
    del config["layer_types"], config["moe_layers"], config["no_rope_layers"]
    (_, tuned), (_, plain) = (parse_model({**config, "attn_temperature_tuning": each}) for each in (4, 0))
    assert isinstance(tuned, Llama4TextConfig)
    assert isinstance(plain, Llama4TextConfig)
    assert tuned.temperature is not None
    assert plain.temperature is None
    assert [layer.chunk_size for layer in tuned.attention] == [32, 32, 32, None]
    assert [layer.rope is None for layer in tuned.attention] == [False, False, False, True]


@pytest.mark.parametrize("family", MIXTURES)
def test_half_precision_stays_close(
    tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any, family: str
) -> None:
    """For most tokens: where a choice of experts is near a tie, rounding turns it, for those behind it, too."""
    folder, ids = tiny_checkpoint(family), [(7 * i * i) % 480 + 3 for i in range(60)]
    run = paged_run(load_model(folder, dtype="bfloat16"), num_sequences=1, max_tokens=64)
    ours = torch.cat([run.step({0: ids[:30]})[0], run.step({0: ids[30:]})[0]])
    agreement = torch.nn.functional.cosine_similarity(ours, reference(folder).logits(ids), dim=-1)
    assert float(agreement.median()) > 0.99
