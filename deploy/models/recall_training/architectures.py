"""The shapes that are trained, by name: each a configuration of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from recall_training.tokenizer import CONTEXT


def llama_config(**common: Any) -> LlamaConfig:
    """Grouped-query attention: about 1.5 million parameters, 6 MB in float32."""
    return LlamaConfig(**common, num_key_value_heads=3, head_dim=32)


def mla_config(**common: Any) -> DeepseekV3Config:
    """Multi-head latent attention and 4 experts, as DeepSeek-V3 and Moonlight have them: 1.8 million parameters.

    The first layer is dense.  Of the others each token goes to 2 of 4 experts, beside a shared one of three
    times their size.
    """
    return DeepseekV3Config(
        **common,
        num_key_value_heads=common["num_attention_heads"],
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=16,
        qk_rope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=1,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
    )


ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {"llama": llama_config, "mla": mla_config}


def build_model(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return a model with fresh weights, in float32.

    Its experts run one after the other: under autocast that is the form which every version of
    transformers has.
    """
    config = ARCHITECTURES[architecture](
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    experts = {} if architecture == "llama" else {"experts_implementation": "eager"}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **experts)
    return model.float()
