"""The choice of an attention backend, with the reasons against the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from attention.backend import AttentionBackend, AttentionSpec
from attention.errors import AttentionBackendError
from attention.registry import PRIORITY, get_backend

_FORCED: ContextVar[str | None] = ContextVar("forced_attn_backend", default=None)


@dataclass(frozen=True)
class Selection:
    """A backend, and for every backend that was looked at why it cannot be used (empty: it can)."""

    backend: type[AttentionBackend]
    reasons: dict[str, list[str]]


@contextmanager
def force_attn_backend(name: str) -> Iterator[None]:
    """Make `select_backend` take this backend or fail, whatever the configuration says.

    Raises:
        AttentionBackendError: no such backend.
    """
    get_backend(name)
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def select_backend(
    device: torch.device,
    dtype: torch.dtype,
    specs: AttentionSpec | Sequence[AttentionSpec],
    block_size: int,
    forced: str | None = None,
) -> Selection:
    """Choose the backend for a model: `force_attn_backend`, else `forced`, else the first usable one by priority.

    Args:
        device: where the model runs.
        dtype: of queries, keys and values.
        specs: every kind of layer that the model has; the backend must run all of them.
        block_size: tokens in a KV block.
        forced: a name from the configuration.

    Raises:
        AttentionBackendError: an unknown name, a forced backend that refuses, or none that is usable; with reasons.
    """
    kinds = [specs] if isinstance(specs, AttentionSpec) else list(specs)
    name = _FORCED.get() or forced
    if name is not None:
        backend = get_backend(name)
        reasons = _refusals(backend, device, dtype, kinds, block_size)
        if reasons:
            raise AttentionBackendError(f"attention backend {name} cannot run this model: {'; '.join(reasons)}")
        return Selection(backend, {name: []})
    chosen: type[AttentionBackend] | None = None
    looked_at: dict[str, list[str]] = {}
    for candidate in PRIORITY.get(device.type, ()):
        try:
            backend = get_backend(candidate)
        except AttentionBackendError as error:
            looked_at[candidate] = [str(error)]
            continue
        looked_at[candidate] = _refusals(backend, device, dtype, kinds, block_size)
        if not looked_at[candidate] and chosen is None:
            chosen = backend
    if chosen is None:
        why = "; ".join(f"{candidate}: {', '.join(reasons)}" for candidate, reasons in looked_at.items())
        raise AttentionBackendError(
            f"no attention backend for device {device.type}, {dtype}, block size {block_size}: "
            f"{why or 'none is made for it'}"
        )
    return Selection(chosen, looked_at)


def _refusals(
    backend: type[AttentionBackend],
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[AttentionSpec],
    block_size: int,
) -> list[str]:
    reasons: dict[str, None] = {}
    for spec in kinds:
        reasons.update(dict.fromkeys(backend.refuse(device, dtype, spec, block_size)))
    return list(reasons)
