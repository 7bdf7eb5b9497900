"""What a forward pass shares with the attention layers inside it: a custom operator takes tensors and names only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch

from attention.backend import AttentionMetadata
from attention.errors import AttentionInputError


class AttentionLayer(Protocol):
    """What a context knows of a layer: `attention.layer.Attention`, or one of latent attention."""

    def attend(
        self,
        context: ForwardContext,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run in this forward pass."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass.

    Attributes:
        layers: attention layers by name.
        metadata: the planned batch of each layer by name; layers of one kind share one.
        kv_caches: the cache of each layer by name; missing where nothing is cached.
        wait_for_layer: called with a layer's name before it attends: returns when the KV that it reads has arrived.
        save_layer: called with a layer's name as soon as the batch's keys and values are in its cache (on a GPU: as
            soon as the kernels that put them there are queued).
    """

    layers: Mapping[str, AttentionLayer]
    metadata: Mapping[str, AttentionMetadata]
    kv_caches: Mapping[str, torch.Tensor]
    wait_for_layer: Callable[[str], None] | None = None
    save_layer: Callable[[str], None] | None = None


_CURRENT: ContextVar[ForwardContext | None] = ContextVar("forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Let the attention layers that run in this block see `context`."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_context() -> ForwardContext:
    """The context of the forward pass that is running.

    Raises:
        AttentionInputError: none is.
    """
    context = _CURRENT.get()
    if context is None:
        raise AttentionInputError("an attention layer ran outside `with forward_context(...)`")
    return context
