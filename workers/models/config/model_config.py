"""What all families have in common of what a checkpoint's config.json says, checked and in one form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from workers.errors import ConfigError
from workers.layers.activation import GatedActivation
from workers.layers.lm_head import vocab_share
from workers.loading.config_reader import ConfigReader
from workers.loading.quantized_storage import Fp8BlockStorage
from workers.models.config.activation import read_activation
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.quantization import read_fp8_blocks, refuse_quantized_weights

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only model; a family adds what its layers need beyond this.

    Attributes:
        family: such as "llama", transformers' `model_type`.
        vocab_size: rows of the embedding.
        hidden_size: H.
        intermediate_size: features that a token goes through in a layer's MLP, or in its chosen experts together.
        activation: of MLPs and experts.
        norm_eps: added to the mean square (or the variance) in norms.
        max_position_embeddings: as the checkpoint states it; see `context_length` for what is served.
        tie_word_embeddings: whether the output matrix is the embedding.
        dtype: of the stored weights, as the config states it (float32 where it does not).
        eos_token_ids: what ends a text, without repeats; may be empty. Checkpoints name such tokens in config.json,
            generation_config.json and the tokenizer's files, which do not always agree: chat models end an answer with
            a token that only one of them calls so. Whatever any of them names counts, here and at the doors.
        bos_token_id: None: there is none.
        attention: of each layer, in order.
        embedding_scale: multiplies the embeddings.
        rounds_embedding_scale: whether it is rounded to the model's dtype before.
        logits_scale: multiplies the logits.
        logits_soft_cap: logits l become `c * tanh(l / c)`; None: they stay.
        fp8_blocks: how the checkpoint stores matrices that it holds a `weight_scale_inv` of; None: it holds none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    activation: GatedActivation
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    attention: tuple[AttentionConfig, ...]
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None
    fp8_blocks: Fp8BlockStorage | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.attention)

    def with_end_token(self, token_id: int | None) -> Self:
        """The same where this token, too, ends a text; None, or one that the model cannot give, changes nothing."""
        if token_id is None or token_id in self.eos_token_ids or not 0 <= token_id < self.vocab_size:
            return self
        return replace(self, eos_token_ids=(*self.eos_token_ids, token_id))

    def shared_out(self) -> Mapping[str, int]:
        """Sizes, beside those of the heads, that the ranks of a worker share out equally, by name."""
        return {"intermediate_size": self.intermediate_size}

    def check_divisible(self, size: int) -> None:
        """Refuse a number of ranks that cannot share the model.

        Raises:
            ConfigError: `size` does not divide it; names the value and the limit.
        """
        for attention in dict.fromkeys(self.attention):
            attention.sharded(size)
        for name, value in self.shared_out().items():
            if value % size:
                raise ConfigError(f"tensor parallelism of {size} does not divide the model's {name}, which is {value}")

    def share_after_attention(self, num_tokens: int) -> float:
        """What part of a layer's multiplications comes when its keys and values are computed and attended to.

        Args:
            num_tokens: of a prompt that is computed whole: each attends to half of them on average.
        """
        layer = self.attention[-1]
        attended = layer.attended_size
        after = self.hidden_size * (attended + 3 * self.intermediate_size)
        before = self.hidden_size * layer.projected_size + num_tokens * attended
        return after / (before + after)

    def context_length(self, asked: int | None = None) -> int:
        """How many tokens a sequence may have.

        Args:
            asked: the operator's `max_model_len`; None: what the model was made for.

        Raises:
            ConfigError: asked for more than the model's positions reach; names both.
        """
        ropes = [layer.rope for layer in self.attention if layer.rope is not None]
        stated = self.max_position_embeddings
        if asked is None:
            return max((rope.context_window(stated) for rope in ropes), default=stated)
        limit = max((rope.longest_context(stated) for rope in ropes), default=stated)
        if asked > limit:
            raise ConfigError(f"model.max_model_len is {asked}, the model has {limit} positions")
        return asked

    def vocab_share(self, size: int) -> int:
        """See `workers.layers.lm_head.vocab_share`."""
        return vocab_share(self.vocab_size, size)

    @classmethod
    def read_common(
        cls,
        read: ConfigReader,
        generation_config: Mapping[str, Any] | None,
        *,
        activation_key: str = "hidden_act",
        norm_eps_key: str = "rms_norm_eps",
        weight_formats: Collection[str] = (),
    ) -> dict[str, Any]:
        """The fields that every family has, but for `attention`, as keyword arguments.

        Args:
            read: config.json.
            generation_config: see `read`.
            activation_key: where the family names its activation.
            norm_eps_key: where it states what its norms add.
            weight_formats: see `refuse_quantized_weights`.

        Raises:
            CheckpointError: a value is missing or wrong; names file and key.
        """
        refuse_quantized_weights(read, weight_formats)
        return {
            "fp8_blocks": read_fp8_blocks(read),
            "family": read.get("model_type"),
            "vocab_size": read.positive_int("vocab_size"),
            "hidden_size": read.positive_int("hidden_size"),
            "intermediate_size": read.positive_int("intermediate_size"),
            "activation": read_activation(read, activation_key),
            "norm_eps": read.positive_float(norm_eps_key),
            "max_position_embeddings": read.positive_int("max_position_embeddings"),
            "tie_word_embeddings": read.flag("tie_word_embeddings"),
            "dtype": _dtype(read),
            "eos_token_ids": _eos_token_ids(read, generation_config),
            "bos_token_id": read.optional_int("bos_token_id"),
        }

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """The model of a config.json of this family.

        Args:
            read: config.json.
            generation_config: generation_config.json; None: there is none.

        Raises:
            CheckpointError: a value is missing, wrong or not supported; names file and key.
        """
        raise NotImplementedError


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
