"""DeepSeek-V3 and R1 (arXiv:2412.19437), Moonlight, Kimi K2: DeepSeek-V2's layers with sigmoid scores and a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.families.deepseek_v2 import DeepseekConfig, DeepseekV2ForCausalLM, read_moe, read_sparse_layers


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DeepseekConfig):
    """DeepSeek-V3."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        return cls(**cls.read_v3(read, generation_config), is_sparse=read_sparse_layers(read))

    @classmethod
    def read_v3(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """As `read_deepseek`, of models that score experts as DeepSeek-V3 does.

        Raises:
            CheckpointError: a value is missing, wrong or not supported; names file and key.
        """
        read.refuse_others({"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
        moe, interleaved = read_moe(read, limits_groups=True, sigmoid=True), read.flag("rope_interleave", True)
        return {
            **cls.read_deepseek(read, generation_config, moe, interleaved),
            "num_mtp_layers": read.non_negative_int("num_nextn_predict_layers", 1),
        }


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3."""

    config_class = DeepseekV3Config
