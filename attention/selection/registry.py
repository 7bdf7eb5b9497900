"""Every attention backend by name. One is imported only when it is asked for, and its kernels only when it runs."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import MappingProxyType

from attention.backend import AttentionBackend
from attention.errors import AttentionBackendError

BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "FLASH_ATTN": "attention.backends.flash_attn:FlashAttnBackend",
        "FLASHINFER": "attention.backends.flashinfer:FlashInferBackend",
        "TRITON_ATTN": "attention.backends.triton_attn.backend:TritonAttnBackend",
        "FLEX_ATTENTION": "attention.backends.flex_attention.backend:FlexAttentionBackend",
        "XFORMERS": "attention.backends.xformers.backend:XFormersBackend",
        "TREE_ATTN": "attention.backends.tree_attn.backend:TreeAttnBackend",
        "TORCH_SDPA": "attention.backends.torch_sdpa.backend:TorchSdpaBackend",
        "CPU_ATTN": "attention.backends.torch_sdpa.cpu_attn:CpuAttnBackend",
        "ROCM_AITER_FA": "attention.backends.rocm.aiter_fa:RocmAiterFaBackend",
        "ROCM_ATTN": "attention.backends.rocm.rocm_attn:RocmAttnBackend",
        "ROCM_FLASH": "attention.backends.rocm.rocm_flash:RocmFlashBackend",
        "PALLAS": "attention.backends.pallas.backend:PallasBackend",
        "IPEX": "attention.backends.ipex.backend:IpexBackend",
        "FLASHMLA": "attention.backends.mla.flashmla:FlashMLABackend",
        "CUTLASS_MLA": "attention.backends.mla.cutlass_mla:CutlassMLABackend",
        "FLASHINFER_MLA": "attention.backends.mla.flashinfer_mla:FlashInferMLABackend",
        "FLASH_ATTN_MLA": "attention.backends.mla.flash_attn_mla:FlashAttnMLABackend",
        "TRITON_MLA": "attention.backends.mla.triton_mla:TritonMLABackend",
        "ROCM_AITER_MLA": "attention.backends.mla.rocm_aiter_mla:RocmAiterMLABackend",
        "CPU_MLA": "attention.backends.mla.cpu_mla:CpuMLABackend",
        "NO_ATTENTION": "attention.backends.no_attention.backend:NoAttentionBackend",
    }
)
"""Name to `module:class`."""


def get_backend(name: str) -> type[AttentionBackend]:
    """The backend of that name.

    Raises:
        AttentionBackendError: no such name; the text lists the right ones and the nearest.
    """
    if name not in BACKENDS:
        nearest = difflib.get_close_matches(name.upper(), BACKENDS, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise AttentionBackendError(f"unknown attention backend {name!r}: one of {', '.join(sorted(BACKENDS))}{hint}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return backend
