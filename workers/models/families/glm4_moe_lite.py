"""GLM-4.7-Flash: DeepSeek-V3's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.families.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLiteConfig(DeepseekV3Config):
    """GLM-4.7-Flash."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        return cls(**cls.read_v3(read, generation_config), is_sparse=_read_sparse_layers(read))


def _read_sparse_layers(read: ConfigReader) -> tuple[bool, ...]:
    """By `mlp_layer_types` or, where it is absent, by `first_k_dense_replace`, which is 1 where that is absent, too."""
    num_layers, kinds = read.positive_int("num_hidden_layers"), read.get("mlp_layer_types")
    if kinds is None:
        first = read.non_negative_int("first_k_dense_replace", 1)
        return tuple(i >= first for i in range(num_layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        raise read.error(
            "mlp_layer_types", f"must be a list of {num_layers} names, each dense or sparse, not {kinds!r}"
        )
    return tuple(kind == "sparse" for kind in kinds)


class Glm4MoeLiteForCausalLM(DeepseekV3ForCausalLM):
    """GLM-4.7-Flash."""

    config_class = Glm4MoeLiteConfig
