"""What a service serves, read from its files before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attention.errors import AttentionBackendError
from attention.selection.registry import BACKENDS, get_backend
from cluster.api import ModelInfo
from cluster.config.groups import groups_of
from cluster.config.schema import ServiceConfig
from cluster.conversation.registry import Formats, choose_formats
from cluster.recall import checkpoint_named
from cluster.text.sampling_defaults import read_sampling_defaults
from cluster.text.tokenizer import Tokenizer
from workers.errors import CheckpointError, ConfigError
from workers.loading.checkpoint import resolve_checkpoint, stored_tensors
from workers.loading.gguf.header import is_gguf
from workers.loading.stored_tensor import StoredTensor
from workers.models.causal_lm import CausalLM
from workers.models.config.model_config import ModelConfig
from workers.models.identity import tokenizer_digest
from workers.models.loader import model_bytes, resolve_dtype
from workers.models.registry import read_model


@dataclass(frozen=True)
class ServedModel:
    """A model as the gateway needs it.

    Attributes:
        name: that clients call it by.
        folder: of the checkpoint, or its GGUF file.
        model_class: builds it.
        config: its settings.
        dtype: that it is computed in.
        stored: its tensors; empty where the weights are random.
        tokenizer: its own.
        tokenizer_digest: of the files that this was loaded from, as workers digest them.
        formats: how it writes tool calls and reasoning.
        sampling_defaults: of what a request's sampling leaves open, by name.
    """

    name: str
    folder: Path
    model_class: type[CausalLM]
    config: ModelConfig
    dtype: torch.dtype
    stored: Sequence[StoredTensor]
    tokenizer: Tokenizer
    tokenizer_digest: str
    formats: Formats
    sampling_defaults: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all its weights, as one worker without ranks holds them."""
        return model_bytes(self.model_class, self.config, self.dtype)

    def info(self, max_model_len: int) -> ModelInfo:
        """What clients are told of it, with the context window that is served."""
        return ModelInfo(
            name=self.name,
            architecture=self.config.family,
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            has_chat_template=self.tokenizer.has_chat_template,
        )


async def read_served_model(config: ServiceConfig) -> ServedModel:
    """Read what there is to read of a model, and refuse what its workers could not load.

    Raises:
        CheckpointError: it is no checkpoint, truncated, or of a kind that Baton does not run.
        ConfigError: the configuration does not fit it.
    """
    path = checkpoint_named(config.model.path)
    folder = (await asyncio.to_thread(resolve_checkpoint, path)).absolute()
    model_class, model = read_model(folder)
    for group in groups_of(config):
        model.check_divisible(group.settings.tensor_parallel_size)
        if group.settings.attention_backend is not None:
            _check_backend_name(group.section, group.settings.attention_backend)
    stored = await asyncio.to_thread(stored_tensors, folder) if config.model.load_format == "auto" else []
    digest = await asyncio.to_thread(tokenizer_digest, folder)
    tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
    if digest != await asyncio.to_thread(tokenizer_digest, folder):
        raise CheckpointError(f"the tokenizer's files in {folder} changed while they were read")
    wanted = config.model.tool_format, config.model.reasoning_format
    return ServedModel(
        name=config.model.served_name or (folder.stem if is_gguf(folder) else Path(path).name),
        folder=folder,
        model_class=model_class,
        config=model,
        dtype=resolve_dtype(config.model.dtype, model.dtype),
        stored=stored,
        tokenizer=tokenizer,
        tokenizer_digest=digest,
        formats=choose_formats(*wanted, tokenizer.chat_template.text, model.family),
        sampling_defaults=read_sampling_defaults(folder) if config.model.generation_config == "auto" else {},
    )


def _check_backend_name(section: str, name: str) -> None:
    """Refuse an attention backend that does not exist.

    Raises:
        ConfigError: with the key and the nearest name.
    """
    if name in BACKENDS:
        return  # what it imports is the workers' affair
    try:
        get_backend(name)
    except AttentionBackendError as error:
        raise ConfigError(f"{section}.attention_backend: {error}") from error
