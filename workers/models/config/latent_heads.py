"""Reading the shape of multi-head latent attention."""

from __future__ import annotations

from attention.spec import MLASpec
from workers.loading.config_reader import ConfigReader
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.rope import RopeFamily, read_rope
from workers.ops.rope_frequencies import softmax_scale_factor


def read_latent_attention(read: ConfigReader, rope: RopeFamily) -> tuple[AttentionConfig, ...]:
    """Layers of latent attention that are alike.

    Args:
        read: config.json.
        rope: what the family adds to the rotation, which is of `qk_rope_head_dim`.

    Raises:
        CheckpointError: a value is missing or wrong; names file and key.
    """
    mla = MLASpec(
        kv_lora_rank=read.positive_int("kv_lora_rank"),
        qk_nope_head_dim=read.positive_int("qk_nope_head_dim"),
        qk_rope_head_dim=read.positive_int("qk_rope_head_dim"),
        v_head_dim=read.positive_int("v_head_dim"),
    )
    if mla.qk_rope_head_dim % 2:
        raise read.error("qk_rope_head_dim", f"must be even for rotary embeddings, not {mla.qk_rope_head_dim}")
    num_heads = read.positive_int("num_attention_heads")
    num_kv_heads = read.optional_positive_int("num_key_value_heads")
    if num_kv_heads not in (None, num_heads):
        raise read.error(
            "num_key_value_heads", f"{num_kv_heads} is not supported, only num_attention_heads, which is {num_heads}"
        )
    rotation = read_rope(read, mla.qk_rope_head_dim, read.positive_int("max_position_embeddings"), rope)
    scale = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5 * softmax_scale_factor(rotation)
    layer = AttentionConfig(num_heads, 1, mla.latent_size, scale, rotation, mla=mla)
    return (layer,) * read.positive_int("num_hidden_layers")


def read_q_lora_rank(read: ConfigReader) -> int | None:
    """The size that queries are compressed to; null: they are not.

    Raises:
        CheckpointError: it is not stated, or not a positive number; names file and key.
    """
    if "q_lora_rank" not in read:
        raise read.error("q_lora_rank", "is missing; null where queries are not compressed")
    return read.optional_positive_int("q_lora_rank")
