"""Where the tensors of multi-head latent attention go."""

from __future__ import annotations

from workers.loading.weight_target import WeightTarget
from workers.models.config.attention_config import AttentionConfig
from workers.models.weight_map import Share, WeightMap


def map_latent_attention(
    weights: WeightMap,
    theirs: str,
    ours: str,
    config: AttentionConfig,
    hidden_size: int,
    *,
    q_lora_rank: int | None,
    bias: bool = False,
) -> None:
    """Enter what `workers.layers.latent_attention.LatentAttention` has, of a layer of the whole model.

    `q_a_proj` (or `q_proj`) and `kv_a_proj_with_mqa` go into one `qkv_a_proj`; `kv_b_proj` is the attention's own.

    Args:
        weights: where they are entered.
        theirs: what the block is called in a checkpoint.
        ours: what it is called in the model.
        config: the layer's attention, with `mla`.
        hidden_size: H.
        q_lora_rank: as of `LatentAttention`.
        bias: as of `LatentAttention`.
    """
    mla, qkv_a = config.mla, f"{ours}.qkv_a_proj"
    assert mla is not None
    q = weights.heads(config.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if q_lora_rank is None:
        weights.matrix(f"{theirs}.q_proj", qkv_a, q, hidden_size)
    else:
        weights.matrix(f"{theirs}.q_a_proj", qkv_a, Share.all(q_lora_rank), hidden_size, bias=bias)
        weights.vector(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_a_norm.weight", q_lora_rank)
        weights.matrix(f"{theirs}.q_b_proj", f"{ours}.q_b_proj", q, q_lora_rank)
    begin = q.length if q_lora_rank is None else q_lora_rank
    latent = Share.all(mla.latent_size)
    weights.matrix(f"{theirs}.kv_a_proj_with_mqa", qkv_a, latent, hidden_size, begin=begin, bias=bias)
    weights.vector(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_a_norm.weight", mla.kv_lora_rank)
    kv_b = weights.heads(config.num_heads, mla.qk_nope_head_dim + mla.v_head_dim)
    shape, region = (kv_b.size, mla.kv_lora_rank), (kv_b.range, (0, mla.kv_lora_rank))
    expansion = WeightTarget("attention.kv_b_proj", shape, region, 0, kv_b.length)
    weights.extend({"kv_b_proj.weight": expansion}, theirs, ours)
    attended = weights.heads(config.num_heads, mla.v_head_dim)
    weights.matrix(f"{theirs}.o_proj", f"{ours}.o_proj", Share.all(hidden_size), attended, bias=bias)
