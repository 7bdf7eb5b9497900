"""Where each tensor of a checkpoint goes in `Decoder`: the renames and the fusions, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from workers.models.config import ModelConfig


@dataclass(frozen=True)
class WeightTarget:
    """A checkpoint tensor's place.

    Attributes:
        parameter: the decoder's parameter.
        shape: what the checkpoint must hold.
        begin: first row of the parameter that it fills.
        end: one past the last; a tensor of fewer dimensions than the parameter is repeated in each row.
    """

    parameter: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_targets(config: ModelConfig) -> dict[str, WeightTarget]:
    """Every tensor that a checkpoint of this model must hold, by its name there."""
    hidden, vocab = config.hidden_size, config.vocab_size
    targets = {
        "model.embed_tokens.weight": WeightTarget("embed_tokens", (vocab, hidden), 0, vocab),
        "model.norm.weight": WeightTarget("norm.weight", (hidden,), 0, hidden),
    }
    if not config.tie_word_embeddings:
        targets["lm_head.weight"] = WeightTarget("lm_head.weight", (vocab, hidden), 0, vocab)
    for i in range(config.num_layers):
        for name, target in _layer_targets(config).items():
            targets[f"model.layers.{i}.{name}"] = WeightTarget(
                f"layers.{i}.{target.parameter}", target.shape, target.begin, target.end
            )
    return targets


def is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although the decoder does not read it."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _layer_targets(config: ModelConfig) -> dict[str, WeightTarget]:
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_size
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q, kv = heads * size, kv_heads * size
    # checkpoint name, our name, first row, rows, columns, bias
    projections = [
        ("self_attn.q_proj", "qkv_proj", 0, q, hidden, config.qkv_bias),
        ("self_attn.k_proj", "qkv_proj", q, kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", "qkv_proj", q + kv, kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", "o_proj", 0, hidden, q, config.o_bias),
        ("mlp.gate_proj", "mlp.gate_up_proj", 0, inner, hidden, config.mlp_bias),
        ("mlp.up_proj", "mlp.gate_up_proj", inner, inner, hidden, config.mlp_bias),
        ("mlp.down_proj", "mlp.down_proj", 0, hidden, inner, config.mlp_bias),
    ]
    targets = {
        "input_layernorm.weight": WeightTarget("input_norm.weight", (hidden,), 0, hidden),
        "post_attention_layernorm.weight": WeightTarget("post_attention_norm.weight", (hidden,), 0, hidden),
    }
    for theirs, ours, begin, rows, columns, bias in projections:
        targets[f"{theirs}.weight"] = WeightTarget(f"{ours}.weight", (rows, columns), begin, begin + rows)
        if bias:
            targets[f"{theirs}.bias"] = WeightTarget(f"{ours}.bias", (rows,), begin, begin + rows)
    if config.qk_norm:
        targets["self_attn.q_norm.weight"] = WeightTarget("qk_norm.weight", (size,), 0, heads)
        targets["self_attn.k_norm.weight"] = WeightTarget("qk_norm.weight", (size,), heads, heads + kv_heads)
    return targets
