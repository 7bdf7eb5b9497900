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
    """What a context knows of a layer: `attention.layers.attention.Attention`, or one of latent attention."""

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

    def run_layer(
        self,
        name: str,
        needs_cache: bool,
        attend: Callable[[AttentionMetadata, torch.Tensor | None], torch.Tensor],
    ) -> torch.Tensor:
        """Run a layer, on its batch and its cache, between the connector's two hooks.

        Args:
            name: the layer's.
            needs_cache: whether it cannot do without a cache.
            attend: what it does, told its batch and its cache; its result is returned.

        Raises:
            AttentionInputError: there is no batch for this layer, or no cache where it needs one.
        """
        metadata, kv_cache = self.metadata.get(name), self.kv_caches.get(name)
        if metadata is None:
            raise AttentionInputError(f"the forward context has no batch for layer {name}")
        if kv_cache is None and needs_cache:
            raise AttentionInputError(f"the forward context has no KV cache for layer {name}")
        if self.wait_for_layer is not None:
            self.wait_for_layer(name)
        attended = attend(metadata, kv_cache)
        if self.save_layer is not None:
            self.save_layer(name)
        return attended


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
