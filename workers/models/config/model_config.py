"""What a checkpoint's config.json says about its architecture, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workers.errors import ConfigError
from workers.models.config.attention_keys import refuse_other_attention
from workers.models.config.quantization import refuse_quantized_weights
from workers.models.config.reader import ConfigReader, read_json
from workers.models.config.sliding_windows import sliding_windows
from workers.ops.rope_config import Llama3Scaling, RopeConfig

FAMILIES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures that one decoder runs, differing by the fields of `ModelConfig`."""

_ATTENTION_KEYS: Mapping[str, tuple[str, ...]] = {"qwen3": ("qk_layernorm", "use_qk_norm")}

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model.

    Attributes:
        family: llama, mistral, qwen2 or qwen3.
        head_size: D; not always hidden_size / num_heads.
        max_position_embeddings: the context window, tokens.
        qkv_bias: whether the query, key and value projections have a bias.
        o_bias: whether the attention's output projection has one.
        mlp_bias: whether the MLP's projections have one.
        qk_norm: whether each head of queries and keys is normalised before rope.
        sliding_windows: for each layer how many tokens a query sees, itself included; None: all.
        dtype: of the stored weights, as the config states it (float32 where it does not).
        eos_token_ids: from config.json and generation_config.json, without repeats; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_file(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json` and, where there is one, `folder/generation_config.json`.

        Raises:
            CheckpointError: a file is missing or unreadable, or the model is none that Baton runs; names file and key.
        """
        generation = folder / "generation_config.json"
        return cls.from_dict(
            read_json(folder / "config.json"),
            read_json(generation) if generation.exists() else None,
            source=str(folder / "config.json"),
        )

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, source: str = "config.json"
    ) -> ModelConfig:
        """Check what config.json (and generation_config.json) hold. `source` names the file in errors."""
        read = ConfigReader(config, source)
        family = _family(read)
        _refuse_unsupported(read, family)
        num_heads = read.positive_int("num_attention_heads")
        hidden_size = read.positive_int("hidden_size")
        num_kv_heads = read.positive_int("num_key_value_heads", num_heads if family == "llama" else None)
        if num_heads % num_kv_heads:
            raise read.error(
                "num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, which is {num_heads}"
            )
        num_layers = read.positive_int("num_hidden_layers")
        biased = family in ("llama", "qwen3") and read.flag("attention_bias", False)
        max_positions = read.positive_int("max_position_embeddings")
        return cls(
            family=family,
            vocab_size=read.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.positive_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=_head_size(read, family, hidden_size, num_heads),
            rms_norm_eps=read.positive_float("rms_norm_eps", 1e-6),
            rope=_rope(read, max_positions),
            max_position_embeddings=max_positions,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            qkv_bias=biased or family == "qwen2",
            o_bias=biased,
            mlp_bias=family == "llama" and read.flag("mlp_bias", False),
            qk_norm=family == "qwen3",
            sliding_windows=sliding_windows(read, family, num_layers),
            dtype=_dtype(read),
            eos_token_ids=_eos_token_ids(read, generation_config),
            bos_token_id=read.optional_int("bos_token_id"),
        )

    def share_after_attention(self, num_tokens: int) -> float:
        """What part of a layer's multiplications comes when its keys and values are computed and attended to.

        Args:
            num_tokens: of a prompt that is computed whole: each attends to half of them on average.
        """
        attended = self.num_heads * self.head_size
        after = self.hidden_size * (attended + 3 * self.intermediate_size)
        before = self.hidden_size * (attended + 2 * self.num_kv_heads * self.head_size) + num_tokens * attended
        return after / (before + after)

    def sharded(self, size: int) -> ModelConfig:
        """What each of `size` ranks computes: of every layer its share of the heads and of the MLP.

        Where there are more ranks than key/value heads, neighbouring ranks have the same one.

        Raises:
            ConfigError: `size` does not divide the model; names the value and the limit.
        """
        for name in ("num_heads", "intermediate_size"):
            value = getattr(self, name)
            if value % size:
                raise ConfigError(f"tensor parallelism of {size} does not divide the model's {name}, which is {value}")
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ConfigError(
                f"tensor parallelism of {size} neither divides the model's num_kv_heads nor is a multiple of it, "
                f"which is {self.num_kv_heads}"
            )
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=max(1, self.num_kv_heads // size),
            intermediate_size=self.intermediate_size // size,
        )

    def vocab_share(self, size: int) -> int:
        """How many tokens' logits each of `size` ranks computes; the last ranks' reach past an uneven vocabulary."""
        return -(-self.vocab_size // size)


def _family(read: ConfigReader) -> str:
    stated = read.get("architectures")
    if stated is not None and not (isinstance(stated, list) and all(isinstance(name, str) for name in stated)):
        raise read.error("architectures", f"must be a list of names, not {stated!r}")
    for name in stated or ():
        if name in FAMILIES:
            return FAMILIES[name]
    model_type = read.get("model_type")
    if not stated and model_type in FAMILIES.values():
        return str(model_type)
    key, value = ("architectures", stated) if stated else ("model_type", model_type)
    raise read.error(key, f"{value!r} is not supported; Baton runs {', '.join(FAMILIES)}")


def _refuse_unsupported(read: ConfigReader, family: str) -> None:
    activation = read.get("hidden_act")
    if activation not in (None, "silu"):
        raise read.error("hidden_act", f"{activation!r} is not supported, only 'silu'")
    refuse_quantized_weights(read)
    refuse_other_attention(read, _ATTENTION_KEYS.get(family, ()))
    partial = read.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise read.error("partial_rotary_factor", f"{partial!r} is not supported, only 1.0")


def _head_size(read: ConfigReader, family: str, hidden_size: int, num_heads: int) -> int:
    if read.get("head_dim") is None:
        if family == "qwen3":
            return 128  # what transformers takes for this family when the key is absent
        if hidden_size % num_heads:
            raise read.error("head_dim", f"is missing, and {num_heads} heads do not divide hidden_size {hidden_size}")
    head_size = read.positive_int("head_dim", hidden_size // num_heads)
    if head_size % 2:
        raise read.error("head_dim", f"must be even for rotary embeddings, not {head_size}")
    return head_size


def _rope(read: ConfigReader, max_positions: int) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` (transformers 5)."""
    key = "rope_parameters" if read.get("rope_parameters") is not None else "rope_scaling"
    given = read.get(key)
    if given is not None and not isinstance(given, Mapping):
        raise read.error(key, f"must be an object, not {given!r}")
    rope = ConfigReader(given or {}, read.source, prefix=f"{key}.")
    theta = rope.positive_float("rope_theta", read.positive_float("rope_theta", 10000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise rope.error("partial_rotary_factor", f"{partial!r} is not supported, only 1.0")
    if kind == "default":
        nested = [name for name, value in (given or {}).items() if isinstance(value, Mapping)]
        if nested:
            raise rope.error(nested[0], "rope settings per kind of layer are not supported")
        return RopeConfig(theta)
    if kind != "llama3":
        raise rope.error("rope_type", f"{kind!r} is not supported, only 'default' and 'llama3'")
    scaling = Llama3Scaling(
        factor=rope.positive_float("factor"),
        low_freq_factor=rope.positive_float("low_freq_factor"),
        high_freq_factor=rope.positive_float("high_freq_factor"),
        original_max_position_embeddings=rope.positive_int("original_max_position_embeddings", max_positions),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error(
            "high_freq_factor",
            f"{scaling.high_freq_factor} must be greater than low_freq_factor, which is {scaling.low_freq_factor}",
        )
    return RopeConfig(theta, scaling)


def _dtype(read: ConfigReader) -> str:
    key = "dtype" if read.get("dtype") is not None else "torch_dtype"
    stated = read.get(key)
    if stated is None:
        return "float32"
    name = str(stated).removeprefix("torch.")
    if name not in DTYPES:
        raise read.error(key, f"{stated!r} is not supported, only {', '.join(DTYPES)}")
    return name


def _eos_token_ids(read: ConfigReader, generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    found = list(read.int_list("eos_token_id"))
    if generation_config is not None:
        sibling = str(Path(read.source).with_name("generation_config.json"))
        found += ConfigReader(generation_config, sibling).int_list("eos_token_id")
    return tuple(dict.fromkeys(found))
