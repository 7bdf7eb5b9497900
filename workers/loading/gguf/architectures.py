"""The architectures of GGUF files that are read, and in which ways their tensors differ from Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import CheckpointError
from workers.loading.config_reader import ConfigReader
from workers.loading.gguf import families
from workers.loading.gguf.header import GgufHeader

_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """A row of the table.

    Attributes:
        name: of the class in transformers, as a config.json has it in `architectures`.
        settings: what a config.json of the family has beside what all have, out of the metadata.
        norms: of a layer, in the file and in Hugging Face's checkpoints.
        is_permuted: whether rows of queries' and keys' projections are in the order that rotates neighbours together.
        has_one_added: whether 1 was added to the norms' weights.
    """

    name: str
    settings: Callable[[ConfigReader, str, GgufHeader], dict[str, Any]]
    norms: Mapping[str, str]
    is_permuted: bool = False
    has_one_added: bool = False

    def permuted_heads(self, header: GgufHeader) -> dict[str, int]:
        """How many heads of queries and of keys there are."""
        read, prefix = ConfigReader(header.metadata, str(header.file)), header.metadata["general.architecture"]
        num_heads = read.positive_int(f"{prefix}.attention.head_count")
        return {"q": num_heads, "k": read.positive_int(f"{prefix}.attention.head_count_kv", num_heads)}


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("LlamaForCausalLM", families.llama, _NORMS, is_permuted=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", families.qwen2, _NORMS),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", families.qwen3, _NORMS),
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", families.gemma2, _GEMMA_NORMS, has_one_added=True),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", families.gemma3, _GEMMA_NORMS, has_one_added=True),
}
"""By `general.architecture`."""


def architecture_of(header: GgufHeader) -> GgufArchitecture:
    """The row of a file's architecture.

    Raises:
        CheckpointError: there is none; names the file and the architecture.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.file}: general.architecture: {name!r} is not supported in GGUF files, "
            f"only {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]
