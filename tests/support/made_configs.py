"""Configurations of families with experts or latents, as they may be published: what goes beside `COMMON`."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Config = dict[str, Any]

_YARN: Config = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
_ROTATIONS: tuple[Config, ...] = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    _YARN,
    {**_YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.0},
    {**_YARN, "attention_factor": 1.3, "truncate": False},
)
_rotations = st.sampled_from(_ROTATIONS).map(dict)
_flags = st.booleans()


def _all_of(**values: st.SearchStrategy[Any] | tuple[Any, ...]) -> st.SearchStrategy[Config]:
    """Every value of its own; those of a tuple are all that there are."""
    return st.fixed_dictionaries({k: st.sampled_from(v) if isinstance(v, tuple) else v for k, v in values.items()})


def _joined(*parts: st.SearchStrategy[Config]) -> st.SearchStrategy[Config]:
    return st.tuples(*parts).map(lambda configs: {key: value for one in configs for key, value in one.items()})


def _layers(*kinds: str) -> st.SearchStrategy[list[str]]:
    """What each of the three layers is."""
    return st.lists(st.sampled_from(kinds), min_size=3, max_size=3)


@st.composite
def _chosen(draw: st.DrawFn, name: str, most: int = 8) -> Config:
    """How many experts, under that name, and how many of them a token has."""
    count = draw(st.sampled_from([n for n in (2, 4, 8) if n <= most]))
    return {name: count, "num_experts_per_tok": draw(st.integers(1, count))}


@st.composite
def _grouped(draw: st.DrawFn) -> Config:
    """Experts in groups of two at least, some of which a token's may be in."""
    groups = draw(st.sampled_from([1, 2, 4]))
    count = draw(st.sampled_from([n for n in (4, 8) if n >= 2 * groups]))
    kept = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, count // groups * kept))
    return {"n_routed_experts": count, "n_group": groups, "topk_group": kept, "num_experts_per_tok": chosen}


_latents = _joined(
    _grouped(),
    st.sampled_from([1, 2, 4]).map(lambda heads: {"num_attention_heads": heads, "num_key_value_heads": heads}),
    _all_of(
        q_lora_rank=(None, 12, 28),
        kv_lora_rank=(8, 24, 40),
        qk_nope_head_dim=(8, 16, 20),
        qk_rope_head_dim=(4, 8, 16),
        v_head_dim=(8, 12, 24),
        n_shared_experts=(1, 2, 3),
        first_k_dense_replace=(0, 1, 2, 3),
        moe_intermediate_size=(12, 20, 64),
        routed_scaling_factor=(1.0, 2.5, 16.0),
        attention_bias=_flags,
        tie_word_embeddings=_flags,
        hidden_act=("silu", "gelu"),
        rms_norm_eps=(1e-6, 1e-5, 1e-2),
        rope_parameters=_rotations,
    ),
)
_heads = _joined(
    st.sampled_from([(4, 2), (4, 4), (6, 2), (4, 1), (8, 2)]).map(
        lambda heads: {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    ),
    _all_of(tie_word_embeddings=_flags, rms_norm_eps=(1e-6, 1e-2), rope_parameters=_rotations),
)
_qwen = _joined(
    _heads,
    _chosen("num_experts"),
    _all_of(
        moe_intermediate_size=(16, 32, 48),
        norm_topk_prob=_flags,
        mlp_only_layers=([], [0], [1, 2], [0, 1, 2]),
        decoder_sparse_step=(1, 2, 3),
        use_sliding_window=_flags,
        sliding_window=(5, 20),
        max_window_layers=(0, 1, 2),
    ),
)
_sizes = _all_of(head_dim=(8, 16, 24, 32), attention_bias=_flags)

CONFIGS: dict[str, st.SearchStrategy[Config]] = {
    "deepseek_v2": _joined(_latents, _all_of(topk_method=("greedy", "group_limited_greedy"))),
    "deepseek_v3": _joined(_latents, _all_of(rope_interleave=_flags, norm_topk_prob=_flags)),
    "glm4_moe_lite": _joined(
        _latents,
        _all_of(
            norm_topk_prob=_flags,
            mlp_layer_types=_layers("sparse", "dense"),
        ),
    ),
    "gpt_oss": _joined(
        _heads,
        _sizes,
        _chosen("num_local_experts"),
        _all_of(
            sliding_window=(3, 16),
            swiglu_limit=(7.0, 1.0),
            swiglu_alpha=(1.702, 1.0),
            layer_types=_layers("full_attention", "sliding_attention"),
        ),
    ),
    "llama4": _joined(
        _heads,
        _sizes,
        _chosen("num_local_experts", most=4),
        _all_of(
            interleave_moe_layer_step=(1, 2),
            use_qk_norm=_flags,
            no_rope_layers=st.lists(st.integers(0, 1), min_size=4, max_size=4),
            attention_chunk_size=(16, 32),
            attn_temperature_tuning=_flags,
            floor_scale=(8, 4096),
        ),
    ),
    "mixtral": _joined(_heads, _chosen("num_local_experts"), _all_of(head_dim=(8, 16, 24), sliding_window=(None, 20))),
    "qwen2_moe": _joined(_qwen, _all_of(shared_expert_intermediate_size=(16, 64), qkv_bias=_flags)).filter(
        lambda config: 64 % config["num_attention_heads"] == 0
    ),
    "qwen3_moe": _joined(_qwen, _sizes, _all_of(hidden_act=("silu", "gelu_pytorch_tanh"))),
}
"""Family to its strategy."""
