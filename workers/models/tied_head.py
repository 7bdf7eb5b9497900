"""Is the output matrix really the embedding? A checkpoint's flag says so, and the file may hold another one.

Fine-tunes and merges train or write an output matrix of their own and leave `tie_word_embeddings` true. As transformers
does, the flag counts only where the file holds one of the two, or both are the same.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from workers.errors import CheckpointError
from workers.loading.checkpoint import stored_tensors
from workers.loading.stored_tensor import StoredTensor
from workers.models.causal_lm import CausalLM
from workers.models.config.model_config import ModelConfig
from workers.models.weight_map import WeightMap

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 8192


def with_stored_head(model_class: type[CausalLM], config: ModelConfig, folder: Path) -> ModelConfig:
    """The config, whose output matrix is not tied if the checkpoint holds one that differs from the embedding.

    Args:
        model_class: runs the model.
        config: as its config.json says.
        folder: the checkpoint's; where it holds no weights, or broken ones, the flag counts.
    """
    if not config.tie_word_embeddings:
        return config
    weights = WeightMap()
    model_class.map_weights(config, weights)
    try:
        stored = {weights.canonical(tensor.name): tensor for tensor in stored_tensors(folder)}
    except CheckpointError:
        return config  # loading will say so
    embedding = next(name for name, targets in weights.targets.items() if targets[0].parameter == "embed_tokens")
    head = next((name for name in weights.tied if name in stored), None)
    if head is None or embedding not in stored or _equal(stored[head], stored[embedding], config.dtype):
        return config
    logger.warning(
        "%s: tie_word_embeddings is true, but %s is stored and differs from %s: it is used, they are not tied",
        folder, head, embedding,
    )  # fmt: skip
    return replace(config, tie_word_embeddings=False)


def _equal(one: StoredTensor, other: StoredTensor, dtype: str) -> bool:
    """Whether two matrices are the same when they are loaded; read a part at a time, up to the first difference."""
    if one.shape != other.shape:
        return False
    loaded: torch.dtype = getattr(torch, dtype)
    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        rows, others = first.get_slice(one.name), second.get_slice(other.name)
        for begin in range(0, one.shape[0], _ROWS_AT_ONCE):
            end = begin + _ROWS_AT_ONCE
            if not torch.equal(rows[begin:end].to(loaded), others[begin:end].to(loaded)):
                return False
    return True
