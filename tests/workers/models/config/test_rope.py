"""Reading rotary embeddings from config.json, in every spelling, against what `transformers` reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from workers.errors import CheckpointError
from workers.loading.config_reader import ConfigReader
from workers.models.config.rope import (
    PLAIN,
    RopeFamily,
    read_global_and_local_rope,
    read_rope,
    read_rotating_layers,
)
from workers.ops.rope_config import LinearScaling, RopeConfig, YarnScaling
from workers.ops.rope_frequencies import attention_factor, inverse_frequencies

HEAD, POSITIONS = 64, 4096
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
GPT_OSS = RopeFamily(
    theta=150000.0,
    parameters={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)
PHI3 = RopeFamily(
    partial_rotary_factor=1.0,
    original_max_position_embeddings=4096,
    renamed={"su": "longrope", "yarn": "longrope"},
)
GLM4 = RopeFamily(partial_rotary_factor=0.5, interleaved=True)
GEMMA3 = RopeFamily(theta=1e6)
SHORT_LONG = {"short_factor": [1.0 + i / 32 for i in range(24)], "long_factor": [2.0 + i for i in range(24)]}


def both(model_type: str, config: dict[str, Any]) -> tuple[ConfigReader, PretrainedConfig]:
    """A config.json, and what `transformers` makes of it."""
    config = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": POSITIONS, **config}
    theirs = AutoConfig.for_model(model_type, **copy.deepcopy(config))
    return ConfigReader(config, "config.json"), theirs


def assert_reads_as(rope: RopeConfig, theirs: PretrainedConfig, layer_type: str | None = None) -> None:
    """The same base, part and frequencies, for short sequences and for long ones."""
    theirs.standardize_rope_params()
    parameters = theirs.rope_parameters if layer_type is None else theirs.rope_parameters[layer_type]
    assert rope.theta == parameters["rope_theta"]
    assert rope.partial_rotary_factor == parameters.get("partial_rotary_factor", 1.0)
    kind = parameters["rope_type"]
    assert (rope.scaling is None) == (kind == "default")
    if kind == "default":
        return
    for length in (None, 100_000):
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), length, layer_type)
        assert torch.equal(inverse_frequencies(rope, HEAD, length), frequencies)
        assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


SPELLINGS: dict[str, dict[str, Any]] = {
    "neither": {},
    "theta alone": {"rope_theta": 5e5},
    "null": {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
    "old": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "older": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    "new, theta beside": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "theta twice": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}},
    "type twice": {"rope_scaling": {"type": "linear", "rope_type": "yarn", **YARN}},
    "both": {
        "rope_scaling": {"rope_type": "yarn", **YARN},
        "rope_parameters": {"rope_theta": 7e5, "rope_type": "linear", "factor": 2.0},
    },
    "both, theta beside": {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", **YARN},
        "rope_parameters": {"rope_theta": 7e5, "rope_type": "linear", "factor": 2.0},
    },
    "both, one empty": {
        "rope_scaling": {},
        "rope_parameters": {"rope_theta": 7e5, "rope_type": "linear", "factor": 2.0},
    },
    "both, theta in both": {
        "rope_scaling": {"type": "default", "rope_theta": 6e5},
        "rope_parameters": {"rope_theta": 7e5, "rope_type": "llama3", **LLAMA3},
    },
    "original inside": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512},
    },
    "original beside": {
        "original_max_position_embeddings": 1024,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    },
    "original in both": {
        "original_max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512},
    },
    "original nowhere": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_as_in_transformers(spelling: str) -> None:
    read, theirs = both("llama", SPELLINGS[spelling])
    assert_reads_as(read_rope(read, HEAD, POSITIONS), theirs)


def test_with_both_spellings_the_old_one_is_taken_whole() -> None:
    read, _ = both("llama", SPELLINGS["both"])
    assert read_rope(read, HEAD, POSITIONS) == RopeConfig(10000.0, YarnScaling(4.0, 1024))


@pytest.mark.parametrize(
    ("model_type", "family", "config"),
    [
        ("gpt_oss", GPT_OSS, {"head_dim": HEAD}),
        ("gpt_oss", GPT_OSS, {"head_dim": HEAD, "rope_theta": 1e4}),
        ("gpt_oss", GPT_OSS, {"head_dim": HEAD, "rope_scaling": {"rope_type": "yarn", **YARN}}),
        ("gpt_oss", GPT_OSS, {"head_dim": HEAD, "rope_parameters": {"rope_type": "default"}}),
        ("glm4", GLM4, {"head_dim": HEAD}),
        ("glm4", GLM4, {"head_dim": HEAD, "partial_rotary_factor": 0.25}),
        ("glm4", GLM4, {"head_dim": HEAD, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        (
            "glm4",
            GLM4,
            {
                "head_dim": HEAD,
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.75},
            },
        ),
        ("phi3", PHI3, {"partial_rotary_factor": 0.5, "rope_theta": 5e5}),
        *(
            (
                "phi3",
                PHI3,
                {
                    "partial_rotary_factor": 0.75,
                    "max_position_embeddings": 131072,
                    "rope_scaling": {"type": kind, **SHORT_LONG, **original},
                    **beside,
                },
            )
            for kind in ("longrope", "su", "yarn")
            for original, beside in (
                ({}, {}),
                ({}, {"original_max_position_embeddings": 2048}),
                ({"original_max_position_embeddings": 1024}, {"original_max_position_embeddings": 2048}),
                ({"original_max_position_embeddings": 1024}, {}),
            )
            if kind != "su" or original  # `transformers` raises KeyError there
        ),
        ("mixtral", RopeFamily(theta=1e6), {}),
        ("llama4_text", RopeFamily(theta=5e5, interleaved=True), {"head_dim": HEAD}),
        ("deepseek_v3", RopeFamily(interleaved=True), {"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0}}),
    ],
)
def test_families_add_what_their_config_does_not_say(
    model_type: str, family: RopeFamily, config: dict[str, Any]
) -> None:
    read, theirs = both(model_type, config)
    rope = read_rope(read, HEAD, config.get("max_position_embeddings", POSITIONS), family)
    assert_reads_as(rope, theirs)
    assert rope.interleaved == family.interleaved


SCALED = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": 2e6, "rope_local_base_freq": 3e4},
        {"rope_theta": 2e6, "rope_scaling": SCALED},
        {"rope_parameters": {"full_attention": {**SCALED, "rope_theta": 2e6}, "sliding_attention": None}},
        {
            "rope_local_base_freq": 3e4,
            "rope_parameters": {"full_attention": {"rope_type": "yarn", **YARN}, "sliding_attention": SCALED},
        },
        {
            "rope_scaling": SCALED,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
        },
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}},
    ],
)
def test_gemma3_has_a_rotation_for_each_type_of_layer(config: dict[str, Any]) -> None:
    read, theirs = both("gemma3_text", {"head_dim": HEAD, "num_hidden_layers": 6, **config})
    full, local = read_global_and_local_rope(read, HEAD, POSITIONS, GEMMA3)
    assert_reads_as(full, theirs, "full_attention")
    assert_reads_as(local, theirs, "sliding_attention")


def test_gemma3_reads_the_oldest_spelling_of_a_kind() -> None:
    read = ConfigReader({"rope_scaling": {"type": "linear", "factor": 8.0}}, "config.json")
    full, local = read_global_and_local_rope(read, HEAD, POSITIONS, GEMMA3)
    assert full == RopeConfig(1e6, LinearScaling(8.0))
    assert local == RopeConfig(1e4)


@pytest.mark.parametrize(
    "config",
    [{}, {"no_rope_layers": []}, {"no_rope_layers": [1, 0, 0, 1, 1, 1]}, {"no_rope_layer_interval": 3}],
)
def test_which_of_llama4s_layers_rotate(config: dict[str, Any]) -> None:
    read, theirs = both("llama4_text", {"num_hidden_layers": 6, **config})
    assert read_rotating_layers(read, 6) == tuple(map(bool, theirs.no_rope_layers))


@pytest.mark.parametrize("stated", [[1, 0], [1, 2, 0], [1, "0", 1], 3])
def test_rotating_layers_must_fit(stated: Any) -> None:
    with pytest.raises(CheckpointError, match="no_rope_layers: must be a list of 3 numbers, each 0 or 1"):
        read_rotating_layers(ConfigReader({"no_rope_layers": stated}, "config.json"), 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "axial"}},
            "rope_scaling.rope_type: 'axial' is not supported, only 'default', 'linear', 'dynamic', 'yarn', "
            "'longrope', 'llama3', 'proportional'",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_parameters.rope_type: \['yarn'\] is not supported"),
        ({"rope_scaling": "llama3"}, "rope_scaling: must be an object, not 'llama3'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: .*per kind of layer"),
        ({"rope_theta": 0}, "rope_theta: must be a number above 0, not 0"),
        ({"rope_theta": float("inf")}, "rope_theta: must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor: must be a number above 0, not -1.0"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
            "high_freq_factor: 0.5 must be at least low_freq_factor, which is 1.0",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor: is missing"),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", **YARN}}, "rope_theta: must be above 1 for 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 1, "beta_slow": 2}},
            "beta_fast: 1.0 must be at least beta_slow, which is 2.0",
        ),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": -1}}, "mscale: must be a number of at least 0"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": 1}}, "truncate: must be true or false"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 0}}, "attention_factor: must be a number"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings: must be at least 1, not 0"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_scaling.short_factor: is missing"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 31}},
            "short_factor: has 31 numbers for the 32 pairs that a head rotates",
        ),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0, 0.0]}}, "short_factor: must be a list of numbers above"),
        ({"rope_scaling": {"type": "su", "short_factor": 1.0}}, "short_factor: must be a list of numbers above 0"),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1}},
            "original_max_position_embeddings: must be at least 2 for 'longrope', not 1",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported for this architecture, only 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: 0.5 is not"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: must be at most 1, not 1.5"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_rope(ConfigReader(config, "/models/x/config.json"), HEAD, POSITIONS)
    assert str(error.value).startswith("/models/x/config.json: ")


@pytest.mark.parametrize(("head_size", "part", "rotated"), [(64, 0.01, 0), (64, 0.05, 3), (10, 0.5, 5)])
def test_a_part_that_makes_no_pairs_is_refused(head_size: int, part: float, rotated: int) -> None:
    read = ConfigReader({"partial_rotary_factor": part}, "config.json")
    with pytest.raises(CheckpointError, match=f"{part} of a head of {head_size} is {rotated}, which must be even"):
        read_rope(read, head_size, POSITIONS, GLM4)


def test_dynamic_scaling_of_a_single_pair_is_refused() -> None:
    read = ConfigReader({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "config.json")
    with pytest.raises(CheckpointError, match="'dynamic' rotates at least 4 dimensions, not 2"):
        read_rope(read, 2, POSITIONS)


def test_a_proportional_share_needs_no_partial_rotation() -> None:
    read = ConfigReader(
        {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}}, "config.json"
    )
    rope = read_rope(read, HEAD, POSITIONS, PLAIN)
    assert rope.rotary_dim(HEAD) == HEAD


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "needs full_attention and sliding_attention, and has"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention: must be an object"),
        ({"rope_local_base_freq": -1.0}, "rope_local_base_freq: must be a number above 0"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope_scaling.rope_type: 'axial' is not supported"),
    ],
)
def test_gemma3_errors_name_their_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_global_and_local_rope(ConfigReader(config, "config.json"), HEAD, POSITIONS, GEMMA3)
