"""An FP8 cache means nothing to layers that cache nothing: their keys are attended to as they come, everywhere."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention.backend import KVScales
from attention.backends import flash_attn
from attention.backends.flash_attn.calls import Call
from attention.backends.flash_attn.versions import PROVIDERS
from attention.backends.xformers import backend
from attention.forward_context import ForwardContext, forward_context
from attention.layers.encoder_only_attention import EncoderOnlyAttention
from attention.metadata import build_encoder_metadata
from attention.platform import Platform
from attention.selection.registry import BACKENDS, get_backend
from attention.spec import FP8, AttentionNeeds, AttentionSpec, AttentionType, Feature
from attention_reference import attend, visible_keys

LENS = (5, 1, 17)
ENCODER = AttentionSpec(4, 2, 64, 0.125, attn_type=AttentionType.ENCODER_ONLY)
NAMES = [
    name
    for name in BACKENDS
    if AttentionType.ENCODER_ONLY in get_backend(name).capabilities.attention_types and name != "NO_ATTENTION"
]
STOOD_IN_FOR = ("FLASH_ATTN", "XFORMERS")
"""Backends whose library is replaced where there is no GPU for it."""


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    spec = replace(ENCODER, scale=scale)
    parts = zip(*(tensor.split(LENS) for tensor in (query, key, value)), LENS, strict=True)
    return torch.cat([attend(q, k, v, spec, visible_keys(spec, n, n)) for q, k, v, n in parts]).to(query.dtype)


def _flash_attn(call: Call) -> None:
    call.output.copy_(_attend(call.query, call.key, call.value, call.scale))


def _fmha(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: Any, scale: float) -> torch.Tensor:
    keys, values = (tensor[0, :, :, 0] for tensor in (k, v))  # every group's heads are the same one
    return _attend(q[0].flatten(1, 2), keys, values, scale)[None]


def _stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "FLASH_ATTN":
        provider = replace(PROVIDERS[-1], kernel=_flash_attn)
        monkeypatch.setattr(flash_attn, "choose_provider", lambda *_, **__: provider)
    elif name == "XFORMERS":
        mask = SimpleNamespace(from_seqlens=lambda *_, **__: None)
        library = SimpleNamespace(BlockDiagonalMask=mask, memory_efficient_attention_forward=_fmha)
        monkeypatch.setattr(backend, "load_library", lambda *_: library)


@pytest.mark.parametrize("found", [True, False], ids=["found-by-looking", "given"])
@pytest.mark.parametrize("name", NAMES)
def test_scales_of_a_cache_are_not_an_encoders(name: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, backend = replace(ENCODER, kv_cache_dtype=FP8), get_backend(name)
    dtype = backend.capabilities.dtypes[0]
    if backend.refuse(Platform.of(device), AttentionNeeds(spec, dtype, 16)):
        if name not in STOOD_IN_FOR or device.type == "cuda":
            pytest.skip(f"{name} does not run such a layer here")
        _stand_in(name, monkeypatch)
    layer = EncoderOnlyAttention(spec, backend, "encoder")
    if not found:
        layer.impl.kv_scales = KVScales(0.125, 4.0)
    common = build_encoder_metadata(LENS, device)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(LENS), heads, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)
    )
    metadata = backend.builder_class(spec, dtype, 16, device).build(common)
    with forward_context(ForwardContext({"encoder": layer}, {"encoder": metadata}, {})):
        attended = layer(query, key, value)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(attended, _attend(query, key, value, spec.scale), **tolerance)


@pytest.mark.parametrize("attn_type", AttentionType)
def test_only_layers_with_a_cache_ask_for_an_fp8_one(attn_type: AttentionType) -> None:
    spec = replace(ENCODER, attn_type=attn_type, kv_cache_dtype=FP8)
    assert (Feature.FP8_KV in spec.features) is spec.fp8_cache is attn_type.cached
