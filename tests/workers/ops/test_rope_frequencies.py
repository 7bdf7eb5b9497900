"""Frequencies and attention factors of every kind of rotary embedding, against those of `transformers`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from workers.loading.config_reader import ConfigReader
from workers.models.config.rope import RopeFamily, read_rope
from workers.ops.rope_config import DynamicScaling, LongRopeScaling, RopeConfig, YarnScaling
from workers.ops.rope_frequencies import attention_factor, inverse_frequencies, softmax_scale_factor

POSITIONS = 4096
ANY_PART = RopeFamily(partial_rotary_factor=1.0)


class _Config(PretrainedConfig):
    """What `transformers` reads of a config when it computes frequencies."""

    rope_parameters: dict[str, Any] | None = None
    head_dim: int = 64
    max_position_embeddings: int = POSITIONS
    hidden_size: int = 64
    num_attention_heads: int = 1


def reference(parameters: dict[str, Any], head_size: int, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    config = _Config(rope_parameters=dict(parameters), head_dim=head_size)
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len)
    return frequencies, factor


def ours(parameters: dict[str, Any], head_size: int) -> RopeConfig:
    read = ConfigReader({"rope_parameters": parameters}, "config.json")
    return read_rope(read, head_size, POSITIONS, ANY_PART)


def assert_equal(parameters: dict[str, Any], head_size: int, length: int | None = None) -> None:
    rope = ours(parameters, head_size)
    frequencies, factor = reference(parameters, head_size, length)
    actual = inverse_frequencies(rope, head_size, length)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, frequencies)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)
    assert 2 * len(actual) == rope.rotary_dim(head_size)


FACTORS = st.floats(1.0, 64.0)
HEADS = st.sampled_from([(64, 1.0), (128, 0.75), (80, 0.4), (256, 0.25), (16, 1.0)])
BASES = st.sampled_from([1e4, 5e5, 1e6, 150000.0])


def parameters_of(kind: str, **more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"rope_type": st.just(kind), "rope_theta": BASES, **more})


def with_part(parameters: dict[str, Any], part: float) -> dict[str, Any]:
    return {**parameters, "partial_rotary_factor": part}


ORIGINAL = st.sampled_from([512, 1024, 2048, 4096])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parameters=st.one_of(
        parameters_of("linear", factor=FACTORS),
        parameters_of("proportional", factor=FACTORS),
        parameters_of("dynamic", factor=FACTORS),
        parameters_of(
            "llama3",
            factor=FACTORS,
            low_freq_factor=st.floats(0.5, 2.0) | st.just(3.0),
            high_freq_factor=st.just(3.0) | st.floats(3.0, 8.0),
            original_max_position_embeddings=ORIGINAL,
        ),
    ),
    head=HEADS,
)
def test_kinds_without_an_attention_factor(parameters: dict[str, Any], head: tuple[int, float]) -> None:
    head_size, part = head
    assert_equal(with_part(parameters, part), head_size)
    assert attention_factor(ours(with_part(parameters, part), head_size)) == 1.0


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    parameters=parameters_of("yarn", factor=FACTORS, original_max_position_embeddings=ORIGINAL),
    optional=st.fixed_dictionaries(
        {},
        optional={
            "beta_fast": st.sampled_from([32, 16.0, 64, 0]),
            "beta_slow": st.sampled_from([1, 2.0, 0]),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.sampled_from([0.707, 1.0, 0]),
            "mscale_all_dim": st.sampled_from([0.707, 1.0, 0.5, 0]),
        },
    ),
    head=HEADS,
)
def test_yarn(parameters: dict[str, Any], optional: dict[str, Any], head: tuple[int, float]) -> None:
    head_size, part = head
    assert_equal(with_part({**parameters, **optional}, part), head_size)


def test_yarn_of_a_single_dimension_is_a_step() -> None:
    bounds = {"beta_fast": 8, "beta_slow": 8, "truncate": False}
    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    assert_equal({**parameters, **bounds}, 64)


def test_a_null_factor_of_yarn_is_the_ratio_of_the_lengths() -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 1024}
    assert_equal(parameters, 64)
    assert ours(parameters, 64).scaling == YarnScaling(4.0, 1024)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parameters=parameters_of("longrope", original_max_position_embeddings=ORIGINAL),
    optional=st.fixed_dictionaries({}, optional={"factor": FACTORS, "attention_factor": st.floats(0.5, 2.0)}),
    head=HEADS,
    seed=st.integers(0, 9),
    length=st.sampled_from([None, 300, 512, 513, 2048, 4096]),
)
def test_longrope(
    parameters: dict[str, Any], optional: dict[str, Any], head: tuple[int, float], seed: int, length: int | None
) -> None:
    head_size, part = head
    pairs = int(head_size * part) // 2
    short, long = (torch.rand(2, pairs, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    factors = {"short_factor": short, "long_factor": long}
    assert_equal(with_part({**parameters, **optional, **factors}, part), head_size, length)


def test_longrope_takes_one_set_for_all_that_is_served() -> None:
    rope = RopeConfig(1e4, LongRopeScaling((1.0, 2.0), (4.0, 8.0), 4.0, 1024))
    plain = inverse_frequencies(RopeConfig(1e4), 4)
    assert torch.equal(inverse_frequencies(rope, 4, 1024), plain / torch.tensor([1.0, 2.0]))
    assert torch.equal(inverse_frequencies(rope, 4, 1025), plain / torch.tensor([4.0, 8.0]))


@pytest.mark.parametrize("length", [None, 100, POSITIONS, POSITIONS + 1, 3 * POSITIONS])
def test_dynamic_is_that_of_the_longest_sequence(length: int | None) -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert_equal(parameters, 64, length)
    unscaled = inverse_frequencies(RopeConfig(1e4), 64)
    assert torch.equal(inverse_frequencies(ours(parameters, 64), 64, length), unscaled) == (
        length is None or length <= POSITIONS
    )
    assert ours(parameters, 64) == RopeConfig(1e4, DynamicScaling(4.0, POSITIONS))


def test_proportional_frequencies_stand_still_behind_their_share() -> None:
    frequencies = inverse_frequencies(
        ours({"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e4}, 64), 64
    )
    assert frequencies.shape == (32,)
    assert (frequencies[:8] > 0).all()
    assert (frequencies[8:] == 0).all()


@pytest.mark.parametrize("mscale_all_dim", [0.0, 0.707, 1.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 40.0])
def test_what_deepseek_multiplies_its_softmax_scale_with(factor: float, mscale_all_dim: float) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": factor,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": mscale_all_dim,
    }
    config = DeepseekV3Config(rope_parameters=dict(parameters), max_position_embeddings=POSITIONS)
    expected = yarn_apply_mscale(config.rope_parameters, 192**-0.5)
    assert 192**-0.5 * softmax_scale_factor(ours(parameters, 64)) == pytest.approx(expected, rel=1e-12)


def test_kinds_without_mscale_leave_the_softmax_scale() -> None:
    assert softmax_scale_factor(RopeConfig(1e4)) == 1.0
    assert softmax_scale_factor(RopeConfig(1e4, YarnScaling(4.0, 1024))) == 1.0
    assert math.isclose(attention_factor(RopeConfig(1e4, YarnScaling(4.0, 1024))), 0.1 * math.log(4) + 1)
