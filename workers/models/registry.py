"""Which class runs a checkpoint, by the architecture that its config.json names."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.loading.config_reader import ConfigReader, read_json
from workers.loading.gguf.config import gguf_config
from workers.loading.gguf.header import is_gguf
from workers.loading.tokenizer_eos import tokenizer_eos_token_id
from workers.models.causal_lm import CausalLM
from workers.models.config.attention_keys import refuse_other_attention
from workers.models.config.model_config import ModelConfig
from workers.models.tied_head import with_stored_head


@dataclass(frozen=True)
class Family:
    """A row of the registry.

    Attributes:
        model_type: transformers' name of the family.
        module: of `workers.models.families`, whose class is called as the architecture.
    """

    model_type: str
    module: str


ARCHITECTURES: Mapping[str, Family] = {
    "Cohere2ForCausalLM": Family("cohere2", "cohere2"),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", "deepseek_v2"),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", "deepseek_v3"),
    "Gemma2ForCausalLM": Family("gemma2", "gemma2"),
    "Gemma3ForCausalLM": Family("gemma3_text", "gemma3"),
    "Gemma3ForConditionalGeneration": Family("gemma3", "gemma3"),
    "Glm4ForCausalLM": Family("glm4", "glm4"),
    "Glm4MoeLiteForCausalLM": Family("glm4_moe_lite", "glm4_moe_lite"),
    "GlmForCausalLM": Family("glm", "glm"),
    "GptOssForCausalLM": Family("gpt_oss", "gpt_oss"),
    "GraniteForCausalLM": Family("granite", "granite"),
    "Llama4ForCausalLM": Family("llama4_text", "llama4"),
    "Llama4ForConditionalGeneration": Family("llama4", "llama4"),
    "LlamaForCausalLM": Family("llama", "llama"),
    "MistralForCausalLM": Family("mistral", "mistral"),
    "MixtralForCausalLM": Family("mixtral", "mixtral"),
    "Olmo2ForCausalLM": Family("olmo2", "olmo2"),
    "Phi3ForCausalLM": Family("phi3", "phi3"),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2"),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", "qwen2_moe"),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", "qwen3_moe"),
    "SmolLM3ForCausalLM": Family("smollm3", "smollm3"),
}
"""Every architecture that Baton runs."""


def model_class(architecture: str) -> type[CausalLM]:
    """The class of a registered architecture."""
    module = importlib.import_module(f"workers.models.families.{ARCHITECTURES[architecture].module}")
    found: type[CausalLM] = getattr(module, architecture)
    return found


def read_model(folder: Path) -> tuple[type[CausalLM], ModelConfig]:
    """What runs the checkpoint in `folder`, and its config.

    Reads `config.json` and, where they are there, `generation_config.json` and the tokenizer's files for its end of a
    text; of a GGUF file its metadata. If the output matrix is to be the embedding, looks whether the weights agree.

    Raises:
        CheckpointError: a file is missing or unreadable, or the model is none that Baton runs; names file and key.
    """
    if is_gguf(folder):
        return parse_model(gguf_config(folder), source=str(folder))
    generation = folder / "generation_config.json"
    found, model = parse_model(
        read_json(folder / "config.json"),
        read_json(generation) if generation.exists() else None,
        source=str(folder / "config.json"),
        tokenizer_eos=tokenizer_eos_token_id(folder),
    )
    return found, with_stored_head(found, model, folder)


def parse_model(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    source: str = "config.json",
    tokenizer_eos: int | None = None,
) -> tuple[type[CausalLM], ModelConfig]:
    """The same for what these files hold; `source` names the file in errors, `tokenizer_eos` is the tokenizer's own."""
    architecture = _architecture(ConfigReader(config, source))
    model_type = ARCHITECTURES[architecture].model_type
    found = model_class(architecture)
    read = ConfigReader({**config, "model_type": model_type}, source, defaults=lambda: _defaults(model_type))
    model = found.config_class.read(read, generation_config)
    refuse_other_attention(read)
    return found, model.with_end_token(tokenizer_eos)


def _architecture(read: ConfigReader) -> str:
    stated = read.get("architectures")
    if stated is not None and not (isinstance(stated, list) and all(isinstance(name, str) for name in stated)):
        raise read.error("architectures", f"must be a list of names, not {stated!r}")
    for name in stated or ():
        if name in ARCHITECTURES:
            return str(name)
    model_type = read.get("model_type")
    if not stated:
        for name, family in ARCHITECTURES.items():
            if family.model_type == model_type:
                return name
    key, value = ("architectures", stated) if stated else ("model_type", model_type)
    raise read.error(key, f"{value!r} is not supported; Baton runs {', '.join(ARCHITECTURES)}")


@functools.cache
def _defaults(model_type: str) -> Mapping[str, Any]:
    """What transformers takes for keys that a config.json of this family does not have."""
    from transformers import AutoConfig

    defaults: Mapping[str, Any] = AutoConfig.for_model(model_type).to_dict()
    return defaults
