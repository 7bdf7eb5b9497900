"""Rotated queries and keys, against those of the `transformers` model whose checkpoints are rotated so."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from workers.layers.context import LayerContext
from workers.layers.linear_methods.choice import linear_method_for
from workers.layers.norm import HeadNorm, RMSNorm
from workers.layers.rotation import FusedRotation, HeadShape, PlainRotation, make_rotation, make_rotations
from workers.loading.config_reader import ConfigReader
from workers.models.config.rope import RopeFamily, read_global_and_local_rope, read_rope
from workers.ops.qk_norm_rope import cos_sin_table, qk_norm_rope_torch_
from workers.ops.rms_norm import rms_norm_torch
from workers.ops.rope_config import LongRopeScaling, RopeConfig
from workers.ops.rotary_frequencies import Rotary
from workers.parallel.group import SINGLE

CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, 5, 2, 300, 1999])
NUM_HEADS, NUM_KV_HEADS, MAX_POSITIONS = 4, 2, 2048
HEADS = HeadShape(NUM_HEADS, NUM_KV_HEADS, 32)
Rotated = tuple[torch.Tensor, torch.Tensor]


def heads_of(seed: int, head_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (len(POSITIONS), NUM_HEADS + NUM_KV_HEADS, head_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_transformers(
    module: Any, family: str, config: Any, heads: torch.Tensor, layer_type: str | None, apply: str
) -> torch.Tensor:
    """(T, H, D) heads rotated by a family's own code."""
    rotary = getattr(module, f"{family}RotaryEmbedding")(config)
    more = () if layer_type is None else (layer_type,)
    angles = rotary(heads, POSITIONS[None], *more)
    rotate: Callable[..., Rotated] = getattr(module, apply)
    if isinstance(angles, torch.Tensor):  # complex numbers; Llama-4 has heads behind tokens, DeepSeek-V2 before them
        before = family.startswith("Deepseek")
        query = heads[None].transpose(1, 2) if before else heads[None]
        rotated = rotate(query, query, angles)[0]
        return rotated[0].transpose(0, 1) if before else rotated[0]
    return rotate(heads[None].transpose(1, 2), heads[None].transpose(1, 2), *angles)[0][0].transpose(0, 1)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 16 for i in range(12)],
    "long_factor": [2.0 + i for i in range(12)],
}
# model_type, class prefix, function, what the config says, what the family adds
CASES: dict[str, tuple[str, str, str, dict[str, Any], RopeFamily]] = {
    "llama": ("llama", "Llama", "apply_rotary_pos_emb", {}, RopeFamily()),
    "llama linear": (
        "llama", "Llama", "apply_rotary_pos_emb", {"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeFamily()
    ),
    "llama dynamic": (
        "llama", "Llama", "apply_rotary_pos_emb", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, RopeFamily()
    ),
    "llama3": ("llama", "Llama", "apply_rotary_pos_emb", {"rope_scaling": LLAMA3}, RopeFamily()),
    "qwen3 yarn": ("qwen3", "Qwen3", "apply_rotary_pos_emb", {"rope_scaling": YARN}, RopeFamily()),
    "gpt-oss": (
        "gpt_oss", "GptOss", "apply_rotary_pos_emb", {"rope_scaling": {**YARN, "truncate": False}},
        RopeFamily(theta=150000.0),
    ),
    "glm4": ("glm4", "Glm4", "apply_rotary_pos_emb", {}, RopeFamily(partial_rotary_factor=0.5, interleaved=True)),
    "cohere2": ("cohere2", "Cohere2", "apply_rotary_pos_emb", {}, RopeFamily(interleaved=True)),
    "phi3 in part": (
        "phi3", "Phi3", "apply_rotary_pos_emb",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 2048, "rope_scaling": LONGROPE},
        RopeFamily(partial_rotary_factor=1.0, original_max_position_embeddings=4096),
    ),
    "llama4": ("llama4_text", "Llama4Text", "apply_rotary_emb", {}, RopeFamily(theta=5e5, interleaved=True)),
    "deepseek-v2": (
        "deepseek_v2", "DeepseekV2", "apply_rotary_emb",
        {"qk_rope_head_dim": 32, "rope_scaling": DEEPSEEK_YARN}, RopeFamily(interleaved=True),
    ),
    "deepseek-v3": (
        "deepseek_v3", "DeepseekV3", "apply_rotary_pos_emb_interleave",
        {"qk_rope_head_dim": 32, "rope_scaling": DEEPSEEK_YARN}, RopeFamily(interleaved=True),
    ),
    "deepseek-v3 of halves": (
        "deepseek_v3", "DeepseekV3", "apply_rotary_pos_emb",
        {"qk_rope_head_dim": 32, "rope_interleave": False}, RopeFamily(),
    ),
}  # fmt: skip


def module_of(model_type: str) -> Any:
    name = model_type.removesuffix("_text")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def config_of(model_type: str, config: dict[str, Any]) -> tuple[ConfigReader, Any]:
    config = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": MAX_POSITIONS, **config}
    if model_type in ("qwen3", "gpt_oss", "glm4", "llama4_text", "gemma3_text"):
        config["head_dim"] = 32
    read = ConfigReader({**config, "rope_scaling": dict(config.get("rope_scaling", {}))}, "config.json")
    return read, AutoConfig.for_model(model_type, **config)


def rotated_by_both(rope: RopeConfig, heads: torch.Tensor) -> Iterator[torch.Tensor]:
    """By `Rotary`, and by the twin of the fused kernel."""
    rotary = Rotary(rope, heads.shape[-1], heads.dtype, CPU, MAX_POSITIONS)
    yield rotary.rotate(heads, rotary.angles(POSITIONS))
    qkv = torch.cat((heads, heads[:, :NUM_KV_HEADS]), dim=1)
    table = cos_sin_table(rope, heads.shape[-1], MAX_POSITIONS, CPU)
    qk_norm_rope_torch_(qkv, NUM_HEADS, NUM_KV_HEADS, POSITIONS, table, interleaved=rope.interleaved)
    assert torch.equal(qkv[:, NUM_HEADS + NUM_KV_HEADS :], heads[:, :NUM_KV_HEADS])
    yield qkv[:, : NUM_HEADS + NUM_KV_HEADS]


@pytest.mark.parametrize("case", CASES)
def test_queries_and_keys_are_rotated_as_in_the_family(case: str) -> None:
    model_type, family, apply, said, adds = CASES[case]
    read, config = config_of(model_type, said)
    heads = heads_of(0, 32)
    expected = in_transformers(module_of(model_type), family, config, heads, None, apply)
    if case == "deepseek-v3":  # there pairs come out as halves; the order of a head's numbers is nothing to attention
        expected = torch.stack(expected.chunk(2, dim=-1), dim=-1).flatten(-2)
    rope = read_rope(read, 32, MAX_POSITIONS, adds)
    for actual in rotated_by_both(rope, heads):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected[1:], heads[1:], atol=0.1)


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_gemma3_rotates_each_type_of_layer_its_way(layer_type: str) -> None:
    said = {"num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    read, config = config_of("gemma3_text", said)
    heads = heads_of(1, 32)
    expected = in_transformers(module_of("gemma3"), "Gemma3", config, heads, layer_type, "apply_rotary_pos_emb")
    full, local = read_global_and_local_rope(read, 32, MAX_POSITIONS, RopeFamily(theta=1e6))
    for actual in rotated_by_both(full if layer_type == "full_attention" else local, heads):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [0.25, 0.75, 1.0])
def test_heads_of_16_bits_turn_by_angles_of_float32(part: float, interleaved: bool) -> None:
    rope = RopeConfig(1e4, None, part, interleaved)
    heads = heads_of(2, 32, torch.bfloat16)
    exact = next(rotated_by_both(rope, heads.double()))
    for actual in rotated_by_both(rope, heads):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.03)
        assert torch.equal(actual[..., int(32 * part) :], heads[..., int(32 * part) :])


def test_dynamic_angles_beyond_the_models_positions_are_those_of_the_longest_sequence() -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=500, hidden_size=128, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    heads = heads_of(3, 32)
    expected = in_transformers(module_of("llama"), "Llama", config, heads, None, "apply_rotary_pos_emb")
    read = ConfigReader({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "config.json")
    rotary = Rotary(read_rope(read, 32, 500), 32, torch.float32, CPU, int(POSITIONS.max()) + 1)
    torch.testing.assert_close(rotary.rotate(heads, rotary.angles(POSITIONS)), expected, rtol=1e-6, atol=1e-6)


def test_longrope_turns_short_sequences_by_the_set_of_the_longest() -> None:
    rope = RopeConfig(1e4, LongRopeScaling((1.0,) * 16, (2.0,) * 16, 4.0, 1024, 1.0))
    short, long = (Rotary(rope, 32, torch.float32, CPU, length).angles(POSITIONS)[0] for length in (1024, 1025))
    half = Rotary(RopeConfig(1e4), 32, torch.float32, CPU).angles(POSITIONS / 2)[0]
    assert torch.equal(short, Rotary(RopeConfig(1e4), 32, torch.float32, CPU).angles(POSITIONS)[0])
    torch.testing.assert_close(long, half)


ROPES = [
    None,
    RopeConfig(1e4),
    RopeConfig(1e4, None, 0.5),
    RopeConfig(1e4, None, 0.75, interleaved=True),
    RopeConfig(1e4, LongRopeScaling((1.0,) * 16, (2.0,) * 16, 4.0, 1024)),
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("normed", [False, True])
def test_plain_and_fused_rotations_agree(rope: RopeConfig | None, normed: bool) -> None:
    qkv = torch.cat((heads_of(4, 32), heads_of(5, 32)[:, :NUM_KV_HEADS]), dim=1)
    norm = None
    if normed:
        context = LayerContext(torch.float32, CPU, SINGLE, linear_method_for(CPU))
        norm = HeadNorm(NUM_HEADS + NUM_KV_HEADS, 32, 1e-5, context)
        norm.weight.data.copy_(heads_of(6, 32)[0])
    results = []
    for kind in (PlainRotation, FusedRotation):
        rotation = kind(rope, HEADS, MAX_POSITIONS, torch.float32, CPU)
        results.append(rotation.apply(qkv.clone(), rotation.prepare(POSITIONS), norm, None))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused)
    if rope is None and not normed:
        assert torch.equal(results[0][0], qkv[:, :NUM_HEADS])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", [PlainRotation, FusedRotation])
def test_latents_are_normalised_and_rotary_parts_rotated_in_place(kind: Any, rope: RopeConfig | None) -> None:
    """However many heads, and inside wider rows."""
    generator = torch.Generator().manual_seed(9)
    wide = torch.randn(len(POSITIONS), 7 * 40 + 24 + 32, generator=generator)
    before, rotation = wide.clone(), kind(rope, HEADS, MAX_POSITIONS, torch.float32, CPU)
    norm = RMSNorm(24, 1e-5, LayerContext(torch.float32, CPU, SINGLE, linear_method_for(CPU)))
    norm.weight.copy_(torch.rand(24, generator=generator))
    query, latent = wide[:, :280].unflatten(1, (7, 40)), wide[:, 280:]
    kv_c, k_pe = rotation.apply_latent(query, latent, rotation.prepare(POSITIONS), norm, None)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        rotary = None if rope is None else Rotary(rope, 32, torch.float32, CPU, MAX_POSITIONS)
        return heads if rotary is None else rotary.rotate(heads, rotary.angles(POSITIONS))

    heads = before[:, :280].unflatten(1, (7, 40))
    assert torch.equal(query[..., :8], heads[..., :8])
    torch.testing.assert_close(query[..., 8:], rotated(heads[..., 8:]))
    torch.testing.assert_close(kv_c, rms_norm_torch(before[:, 280:304], norm.weight, 1e-5))
    torch.testing.assert_close(k_pe, rotated(before[:, None, 304:])[:, 0])


def test_layers_that_turn_alike_share_a_rotation() -> None:
    layers = [(rope, HEADS) for rope in (ROPES[1], ROPES[1], None, ROPES[2], RopeConfig(1e4), None)]
    rotations = make_rotations(layers, MAX_POSITIONS, torch.float32, CPU)
    assert list(rotations) == [(ROPES[1], HEADS), (None, HEADS), (ROPES[2], HEADS)]
    assert rotations[None, HEADS].prepare(POSITIONS) is None
    assert isinstance(make_rotation(None, HEADS, MAX_POSITIONS, torch.float32, CPU), PlainRotation)
