"""Every attention backend by name. One is imported only when it is asked for: its kernels may not be installed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import MappingProxyType

from attention.backend import AttentionBackend
from attention.errors import AttentionBackendError

BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "CPU_ATTN": "attention.backends.cpu_attn:CpuAttnBackend",
        "TORCH_SDPA": "attention.backends.torch_sdpa:TorchSdpaBackend",
    }
)
"""Name to `module:class`."""

PRIORITY: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("CPU_ATTN", "TORCH_SDPA")})
"""For each device type the backends to try, best first."""


def get_backend(name: str) -> type[AttentionBackend]:
    """The backend of that name.

    Raises:
        AttentionBackendError: no such name (the text lists the right ones), or its library cannot be imported.
    """
    if name not in BACKENDS:
        nearest = difflib.get_close_matches(name.upper(), BACKENDS, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise AttentionBackendError(f"unknown attention backend {name!r}: one of {', '.join(sorted(BACKENDS))}{hint}")
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        backend: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise AttentionBackendError(f"attention backend {name} cannot be loaded: {error}") from error
    return backend
