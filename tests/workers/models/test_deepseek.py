"""What is DeepSeek's own: published configs, weights in blocks of FP8, layers that nothing reads, a latent cache."""

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

from ranks import lone_rank
from workers.errors import CheckpointError
from workers.loading.dequantize import dequantize_fp8_blocks
from workers.models.config.model_config import ModelConfig
from workers.models.families.deepseek_v2 import DeepseekConfig
from workers.models.loader import load_model
from workers.models.registry import parse_model
from workers.ops.router_config import RouterConfig

TinyCheckpoint = Callable[..., Path]
IDS = random.Random(0).choices(range(3, 500), k=50)
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

V2_LITE: dict[str, Any] = {
    **LATENT,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}
V3: dict[str, Any] = {
    **V2_LITE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
MOONLIGHT: dict[str, Any] = {
    **{key: value for key, value in V3.items() if key not in ("quantization_config", "rope_scaling")},
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "attention_bias": False,
    "eos_token_id": [154820, 154827, 154829],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}


def read(config: dict[str, Any]) -> DeepseekConfig:
    found: ModelConfig = parse_model(config)[1]
    assert isinstance(found, DeepseekConfig)
    return found


def test_published_configs() -> None:
    """As the checkpoints have them, with what the published code makes of them."""
    lite, v3, moonlight, glm = (read(config) for config in (V2_LITE, V3, MOONLIGHT, GLM))
    mscale = 0.1 * 0.707 * torch.tensor(40.0).log().item() + 1
    assert lite.attention[0].scale == pytest.approx(192**-0.5 * mscale**2)
    assert moonlight.attention[0].scale == 192**-0.5
    assert glm.attention[0].scale == 256**-0.5
    assert [config.attention[0].head_size for config in (lite, v3, moonlight, glm)] == [576] * 4
    assert all(
        config.attention[0].rope.interleaved for config in (lite, v3, moonlight, glm) if config.attention[0].rope
    )
    assert [config.is_sparse.index(True) for config in (lite, v3, moonlight, glm)] == [1, 3, 1, 1]
    assert [config.moe.shared_intermediate_size for config in (lite, v3, moonlight, glm)] == [2816, 2048, 2816, 1536]
    assert lite.moe.router == RouterConfig(64, 6)
    limited = RouterConfig(256, 8, "sigmoid", True, 2.5, num_groups=8, top_k_groups=4, group_score="sum_of_two")
    assert v3.moe.router == limited
    assert not moonlight.moe.router.limits_groups
    assert v3.fp8_blocks is not None
    assert (lite.fp8_blocks, moonlight.fp8_blocks) == (None, None)
    assert (v3.context_length(), lite.context_length(), moonlight.context_length()) == (163840, 163840, 8192)
    v2 = read({**V2_LITE, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "q_lora_rank": 1536})
    assert v2.moe.router == RouterConfig(64, 6, num_groups=8, top_k_groups=3)
    assert read({**V2_LITE, "n_shared_experts": None}).moe.shared_intermediate_size == 0
    every_third = read({**V2_LITE, "moe_layer_freq": 3, "first_k_dense_replace": 4, "num_hidden_layers": 10})
    assert [i for i, is_sparse in enumerate(every_third.is_sparse) if is_sparse] == [6, 9]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            V2_LITE,
            {"scoring_func": "sigmoid"},
            "scoring_func: 'sigmoid' is not supported for this architecture, only 'softmax'",
        ),
        (V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob: True is not supported"),
        (V2_LITE, {"mlp_bias": True}, "mlp_bias: True is not supported"),
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc' is not supported, only greedy and"),
        (V2_LITE, {"num_key_value_heads": 4}, "num_key_value_heads: 4 is not supported, only num_attention_heads"),
        (V2_LITE, {"qk_rope_head_dim": 63}, "qk_rope_head_dim: must be even"),
        (V2_LITE, {"kv_lora_rank": None}, "kv_lora_rank: is missing"),
        (V2_LITE, {"num_experts_per_tok": 65}, "n_routed_experts: 65 experts for each token of 64"),
        (
            V3,
            {"scoring_func": "softmax"},
            "scoring_func: 'softmax' is not supported for this architecture, only 'sigmoid'",
        ),
        (
            V3,
            {"topk_method": "greedy"},
            "topk_method: 'greedy' is not supported for this architecture, only 'noaux_tc'",
        ),
        (V3, {"n_group": 7}, "n_routed_experts: 256 experts do not form 7 equal groups"),
        (V3, {"index_topk": 2048}, "index_topk: 2048 is not supported: sparse attention"),
        (GLM, {"mlp_layer_types": ["dense", "moe"]}, "mlp_layer_types: must be a list of 47 names, each dense"),
        (GLM, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_model({**config, **change})


def test_compressed_queries_must_be_stated() -> None:
    with pytest.raises(CheckpointError, match="q_lora_rank: is missing; null where queries are not compressed"):
        parse_model({key: value for key, value in V2_LITE.items() if key != "q_lora_rank"})


def in_blocks(folder: Path, out: Path, block: tuple[int, int], excluded: tuple[str, ...]) -> tuple[Path, Path]:
    """A checkpoint with its layers' matrices in FP8, and one with the numbers that these stand for."""
    plain, packed = out / "plain", out / "packed"
    numbers, stored = load_file(folder / "model.safetensors"), {}
    for name, tensor in numbers.items():
        if tensor.dim() != 2 or ".layers." not in name or any(part in name for part in excluded):
            stored[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        scales = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                part = tensor[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                scales[i, j] = part.abs().max() / 448
        each = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        values = (tensor / each[: tensor.shape[0], : tensor.shape[1]]).to(torch.float8_e4m3fn)
        stored |= {name: values, f"{name}_scale_inv": scales}
        numbers[name] = dequantize_fp8_blocks(values, scales, torch.float32, block)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    for each_folder, tensors, more in ((plain, numbers, {}), (packed, stored, {"quantization_config": quantization})):
        each_folder.mkdir()
        save_file(tensors, each_folder / "model.safetensors")
        (each_folder / "config.json").write_text(json.dumps({**config, **more}))
    return plain, packed


def parameters(folder: Path, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype="float32", group=lone_rank(rank, size)).named_parameters())


@pytest.mark.parametrize(
    ("family", "block"), [("deepseek_v3", (16, 12)), ("deepseek_v2", (128, 128)), ("qwen3", (9, 32))]
)
def test_weights_in_blocks_of_fp8(
    tiny_checkpoint: TinyCheckpoint,
    reference: Any,
    paged_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    block: tuple[int, int],
) -> None:
    """Blocks that the edges and the ranks' shares cut: the numbers that they stand for, in every rank's place."""
    plain, packed = in_blocks(tiny_checkpoint(family), tmp_path, block, excluded=("mlp.gate.", "kv_a_proj"))
    expected = reference(plain).logits(IDS)
    run = paged_run(load_model(packed, dtype="float32"), num_sequences=1, max_tokens=64)
    ours = torch.cat([run.step({0: IDS[:30]})[0], run.step({0: IDS[30:]})[0]])
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), rtol=1e-4, atol=2e-4)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # weights stay as they are loaded
    for rank, size in ((0, 2), (3, 4)):
        wanted = parameters(plain, rank, size)
        for name, parameter in parameters(packed, rank, size).items():
            assert torch.equal(parameter, wanted[name]), name


def test_a_matrix_of_fp8_without_its_scales_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    _, packed = in_blocks(tiny_checkpoint("deepseek_v3"), tmp_path, (16, 12), excluded=("mlp.gate.",))
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"kv_b_proj\.weight has dtype F8_E4M3, it must be one of"):
        load_model(packed)
    save_file({**tensors, f"{name}_scale_inv": scales[1:]}, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"kv_b_proj\.weight_scale_inv has shape"):
        load_model(packed)


def test_layers_that_predict_further_tokens_are_left_in_the_file(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """DeepSeek-V3's are one layer more, in FP8, too; what lies behind them has no place."""
    folder = shutil.copytree(tiny_checkpoint("deepseek_v3"), tmp_path / "mtp")
    tensors = load_file(folder / "model.safetensors")
    mtp = {
        "model.layers.3.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.3.self_attn.kv_b_proj.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        "model.layers.3.self_attn.kv_b_proj.weight_scale_inv": torch.ones(1, 1),
        "model.layers.3.shared_head.head.weight": torch.zeros(512, 64),
    }
    save_file({**tensors, **mtp}, folder / "model.safetensors")
    load_model(folder)
    save_file({**tensors, "model.layers.4.eh_proj.weight": torch.zeros(64, 128)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.eh_proj\.weight has no place"):
        load_model(folder)


def test_experts_as_transformers_keeps_them(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    folder = tiny_checkpoint("deepseek_v3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    published = parameters(folder)
    for name, parameter in parameters(tmp_path).items():
        assert torch.equal(parameter, published[name]), name


def test_the_cache_is_one_latent_a_token(tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any) -> None:
    folder = tiny_checkpoint("deepseek_v2")
    (spec,) = load_model(folder, dtype="bfloat16").kv_cache_groups
    assert (spec.kind, spec.layers) == ("mla", (0, 1, 2))
    assert spec.bytes_per_token == 3 * (24 + 8) * 2
    assert spec.shape(5) == (3, 5, 16, 32)
    run = paged_run(load_model(folder, dtype="float32", kv_cache_dtype="fp8"), num_sequences=1, max_tokens=64)
    assert run.caches[0].dtype == torch.float8_e4m3fn
    ours = torch.cat([run.step({0: IDS[:30]})[0], *(run.step({0: [token]})[0] for token in IDS[30:])])
    agreement = torch.nn.functional.cosine_similarity(ours, reference(folder).logits(IDS), dim=-1)
    assert float(agreement.min()) > 0.98


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_half_precision_stays_close(
    tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any, family: str
) -> None:
    folder = tiny_checkpoint(family, num_hidden_layers=1, first_k_dense_replace=1)  # a choice of experts may flip
    run = paged_run(load_model(folder, dtype="bfloat16"), num_sequences=1, max_tokens=64)
    ours = torch.cat([run.step({0: IDS[:49]})[0], run.step({0: IDS[49:]})[0]])
    agreement = torch.nn.functional.cosine_similarity(ours, reference(folder).logits(IDS), dim=-1)
    assert float(agreement.min()) > 0.99


def test_random_weights(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    folder = tiny_checkpoint("deepseek_v3")
    shards = [
        dict(load_model(folder, "float32", load_format="dummy", group=lone_rank(rank, 2)).named_parameters())
        for rank in range(2)
    ]
    whole = dict(load_model(folder, "float32", load_format="dummy").named_parameters())
    name = "layers.1.self_attention.attention.kv_b_proj"
    assert torch.equal(torch.cat([shard[name] for shard in shards]), whole[name])
    assert float(whole[name].std()) == pytest.approx(0.02, rel=0.05)
    assert bool((whole["layers.1.mlp.router.e_score_correction_bias"] == 0).all())
    assert bool((whole["layers.1.self_attention.kv_a_norm.weight"] == 1).all())
