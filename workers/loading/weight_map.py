"""Where each tensor of a checkpoint goes in `Decoder`: the renames, the fusions and the shards, as a table.

Of `size` ranks each holds some output features of a layer's first projections (rows of their weights) and the same
input features of its second ones (columns), after Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.loading.checkpoint import Region, whole
from workers.models.config.model_config import ModelConfig


@dataclass(frozen=True)
class WeightTarget:
    """A checkpoint tensor's place.

    Attributes:
        parameter: the decoder's parameter.
        shape: what the checkpoint must hold.
        region: the part of that which this rank holds; may be empty.
        begin: first row of the parameter that it fills.
        end: one past the last; a tensor of fewer dimensions than the parameter is repeated in each row.
    """

    parameter: str
    shape: tuple[int, ...]
    region: Region
    begin: int
    end: int


@dataclass(frozen=True)
class _Shard:
    """A dimension of a checkpoint's tensor, and the part of it that this rank holds."""

    size: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def weight_targets(config: ModelConfig, rank: int = 0, size: int = 1) -> dict[str, WeightTarget]:
    """Every tensor that a checkpoint of this model must hold, by its name there, for one of `size` ranks.

    The embedding is whole on every rank: looking it up then takes no communication, for little memory. Of the output
    matrix each rank holds its `vocab_share`; of a tied one that is a view of the embedding.

    Raises:
        ConfigError: `size` does not divide the model.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    targets = {
        "model.embed_tokens.weight": WeightTarget("embed_tokens", (vocab, hidden), whole((vocab, hidden)), 0, vocab),
        "model.norm.weight": _vector("norm.weight", hidden, 0, hidden),
    }
    if not config.tie_word_embeddings:
        share = config.vocab_share(size)
        rows = min(rank * share, vocab), min((rank + 1) * share, vocab)
        targets["lm_head.weight"] = WeightTarget(
            "lm_head.weight", (vocab, hidden), (rows, (0, hidden)), 0, rows[1] - rows[0]
        )
    layer = _layer_targets(config, rank, size)
    for i in range(config.num_layers):
        for name, target in layer.items():
            targets[f"model.layers.{i}.{name}"] = WeightTarget(
                f"layers.{i}.{target.parameter}", target.shape, target.region, target.begin, target.end
            )
    return targets


def is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although the decoder does not read it."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _layer_targets(config: ModelConfig, rank: int, size: int) -> dict[str, WeightTarget]:
    own, head_size = config.sharded(size), config.head_size
    hidden = _Shard(config.hidden_size, 0, config.hidden_size)
    q = _nth(config.num_heads * head_size, own.num_heads * head_size, rank)
    first_kv_head = rank * config.num_kv_heads // size  # of neighbouring ranks the same, where heads are fewer
    kv = _nth(config.num_kv_heads * head_size, own.num_kv_heads * head_size, first_kv_head // own.num_kv_heads)
    inner = _nth(config.intermediate_size, own.intermediate_size, rank)
    # checkpoint name, our name, first row, rows, columns, bias
    projections = [
        ("self_attn.q_proj", "qkv_proj", 0, q, hidden, config.qkv_bias),
        ("self_attn.k_proj", "qkv_proj", q.length, kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", "qkv_proj", q.length + kv.length, kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", "o_proj", 0, hidden, q, config.o_bias),
        ("mlp.gate_proj", "mlp.gate_up_proj", 0, inner, hidden, config.mlp_bias),
        ("mlp.up_proj", "mlp.gate_up_proj", inner.length, inner, hidden, config.mlp_bias),
        ("mlp.down_proj", "mlp.down_proj", 0, hidden, inner, config.mlp_bias),
    ]
    targets = {
        "input_layernorm.weight": _vector("input_norm.weight", hidden.size, 0, hidden.size),
        "post_attention_layernorm.weight": _vector("post_attention_norm.weight", hidden.size, 0, hidden.size),
    }
    for theirs, ours, begin, rows, columns, bias in projections:
        shape, end = (rows.size, columns.size), begin + rows.length
        region = ((rows.begin, rows.end), (columns.begin, columns.end))
        targets[f"{theirs}.weight"] = WeightTarget(f"{ours}.weight", shape, region, begin, end)
        if bias:
            targets[f"{theirs}.bias"] = WeightTarget(f"{ours}.bias", shape[:1], region[:1], begin, end)
    if config.qk_norm:
        targets["self_attn.q_norm.weight"] = _vector("qk_norm.weight", head_size, 0, own.num_heads)
        targets["self_attn.k_norm.weight"] = _vector(
            "qk_norm.weight", head_size, own.num_heads, own.num_heads + own.num_kv_heads
        )
    return targets


def _vector(parameter: str, length: int, begin: int, end: int) -> WeightTarget:
    """A tensor of one dimension that every rank holds whole."""
    return WeightTarget(parameter, (length,), whole((length,)), begin, end)


def _nth(size: int, share: int, n: int) -> _Shard:
    return _Shard(size, n * share, (n + 1) * share)
