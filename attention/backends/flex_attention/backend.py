"""FLEX_ATTENTION: PyTorch's FlexAttention (arXiv:2412.05496) over the paged cache, for whatever no other backend does.

Keys and values are gathered out of the cache, a bounded group of sequences at a time, and every feature is a mask or
score function that the compiler fuses into one kernel. Gathering costs memory traffic that kernels with block tables
do not have; in return any head size, any block size and FP8 work, and unused slots of a block are never read.

On a GPU `flex_attention` is compiled, once for every kind of layer and a handful of times for shapes (a dimension of 1
is a shape of its own). On a CPU the operator behind it writes out every score: right, and good for tests only.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator
from torch.nn.attention import flex_attention as flex

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, refuse_masks
from attention.backends.flex_attention.plan import TILE, FlexGroup, plan_groups
from attention.backends.triton_attn.backend import slopes_tensor
from attention.capability import FLOATS, HOPPER, X86, Capabilities, DeviceSupport
from attention.errors import AttentionInputError
from attention.fp8 import dequantize
from attention.kv_cache import reshape_and_cache, take_rows, token_rows
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, AttentionType, Feature

_GATHERED_BYTES = 1 << 30
"""Keys and values gathered at a time on a GPU."""
_EAGER_TOKENS = 4096
"""Keys gathered at a time on a CPU, where a score is written out for every query and key."""
_MAX_HEAD_BYTES = 2048
"""Of one head of a query on a GPU: more does not fit the shared memory with the smallest tiles."""
_MIN_HEAD_SIZE = 16
"""The smallest matrix that Triton multiplies; smaller heads are padded."""
_SHARED_MEMORY = 80 << 10
"""Bytes of queries, keys and values that a kernel may hold, on any GPU from SM 8.0 on."""
_MOST_VARIANTS = 1024
"""Compiled variants: dtypes, head sizes, features and shapes that one process may use."""
_SETTINGS = threading.RLock()
"""Held while the compiler's settings are changed, which not every PyTorch keeps apart for each thread."""


@dataclass(frozen=True)
class FlexAttentionMetadata(AttentionMetadata):
    """A planned batch."""

    groups: tuple[FlexGroup, ...]


class FlexAttentionMetadataBuilder(AttentionMetadataBuilder):
    """Finds every query's keys, and writes block masks."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._slopes = slopes_tensor(spec, device)
        per_token = 2 * spec.num_kv_heads * spec.head_size * dtype.itemsize
        self._max_tokens = _EAGER_TOKENS if device.type == "cpu" else max(1, _GATHERED_BYTES // per_token)

    def build(self, common: CommonAttentionMetadata) -> FlexAttentionMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, FlexAttentionBackend.capabilities.features, FlexAttentionBackend.name)
        if common.tree_mask is not None and self.spec.attn_type is not AttentionType.DECODER:
            raise AttentionInputError(f"a tree mask is for decoders, this is {self.spec.attn_type}")
        groups = plan_groups(self.spec, common, self.block_size, self._max_tokens, self._slopes)
        return FlexAttentionMetadata(common, groups)


class FlexAttentionImpl(AttentionImpl):
    """One call of `flex_attention` for each group."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`."""
        assert isinstance(metadata, FlexAttentionMetadata)
        if kv_cache is not None and key is not None and value is not None:
            reshape_and_cache(key, value, kv_cache, metadata.common.slot_mapping, self.kv_scales)
        if output is None:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
        attended = sum(group.q_end - group.q_begin for group in metadata.groups)
        if attended < query.shape[0]:  # sequences without keys are in no group
            output.zero_()
        for group in metadata.groups:
            rows = slice(group.q_begin, group.q_end)
            if group.rows is not None and kv_cache is not None:
                keys, values = self._gather(kv_cache, group.rows, query.dtype)
            elif key is not None and value is not None:
                keys, values = key[rows], value[rows]
            else:
                raise AttentionInputError(f"{self.spec.attn_type} attention needs a KV cache, or keys and values")
            output[rows] = self._attend(query[rows], keys, values, group)
        return output

    def _gather(
        self, kv_cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, Hkv, D) each, of the query's dtype."""
        block_size, *head = kv_cache.shape[2:]
        cache = token_rows(kv_cache)
        key, value = (take_rows(cache, half).view(-1, *head) for half in (rows, rows + block_size))
        if self.spec.fp8_cache:
            scales = self.kv_scales
            key, value = dequantize(key, scales.k).to(dtype), dequantize(value, scales.v).to(dtype)
        return key, value

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: FlexGroup) -> torch.Tensor:
        """(n, Hq, D) against (S, Hkv, D)."""
        head_size = query.shape[2]
        on_gpu = query.device.type != "cpu"
        if on_gpu and head_size < _MIN_HEAD_SIZE:
            query, key, value = (
                torch.nn.functional.pad(tensor, (0, _MIN_HEAD_SIZE - head_size)) for tensor in (query, key, value)
            )
        q = query[:, :, None] if group.batched else query.transpose(0, 1)[None]
        call = _compiled if on_gpu else _eager
        out, lse = call(
            q,
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            group,
            self.spec.scale,
            self.spec.num_heads != self.spec.num_kv_heads,
            self.sinks is not None,
        )
        if self.sinks is not None and lse is not None:
            out = out * torch.sigmoid(lse - self.sinks[:, None])[..., None]
        out = out[:, :, 0] if group.batched else out[0].transpose(0, 1)
        return out[..., :head_size].to(query.dtype)


def _compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: FlexGroup,
    scale: float,
    gqa: bool,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    settings = torch._dynamo.config.patch(
        recompile_limit=_MOST_VARIANTS,
        accumulated_recompile_limit=_MOST_VARIANTS,
        specialize_float=True,  # a kernel's scale and soft cap are constants, not scalars that it is given
    )
    # Two lengths that happen to be equal in one batch are not so in the next.
    unrelated = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with _SETTINGS, settings, unrelated, torch.no_grad():
        out, aux = _compiled_flex_attention()(
            query,
            key,
            value,
            score_mod=group.score_mod,
            block_mask=group.block_mask,
            scale=scale,
            enable_gqa=gqa,
            kernel_options=kernel_options(query.dtype, query.shape[3], group.batched),
            return_aux=flex.AuxRequest(lse=with_lse),
        )
    return out, aux.lse


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: FlexGroup,
    scale: float,
    gqa: bool,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator behind `flex_attention`, which writes all scores out.

    Uncompiled, the function itself traces the operator for every new shape, with settings of the whole process changed
    meanwhile; the switch that stops it from doing so is one, too.
    """
    score_mod = group.score_mod or _as_it_is
    with torch.no_grad():
        out, lse, _ = flex_attention_operator(query, key, value, score_mod, group.block_mask.as_tuple(), scale, {})
    return out, lse * math.log(2.0) if with_lse else None


def _as_it_is(
    score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return score


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention, dynamic=True, fullgraph=True)


def kernel_options(dtype: torch.dtype, head_size: int, batched: bool) -> dict[str, Any]:
    """How the compiled kernel is launched.

    PyTorch has tuned defaults for half precision and the usual head sizes; its fallbacks for the others ask for more
    shared memory than there is. One kernel serves all shapes: the one for short queries fixes what should be dynamic.
    """
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if dtype is torch.float32:
        options["FLOAT32_PRECISION"] = "'ieee'"
    elif head_size in (64, 128) and not batched:
        return options
    row_bytes = (1 << (head_size - 1).bit_length()) * dtype.itemsize
    shapes = ((64, 64), (64, 32), (32, 32), (16, 32), (16, 16)) if not batched else ((16, 64), (16, 32), (16, 16))
    fitting = (
        (rows, keys, stages)
        for rows, keys in shapes
        for stages in (2, 1)
        if (rows + 2 * stages * keys) * row_bytes <= _SHARED_MEMORY
    )
    rows, keys, stages = next(fitting, (16, 16, 1))
    assert TILE % rows == 0
    assert TILE % keys == 0
    return options | {"BLOCK_M": rows, "BLOCK_N": keys, "num_stages": stages, "num_warps": 4}


class FlexAttentionBackend(AttentionBackend):
    """FlexAttention: the most general backend, and rarely the fastest."""

    name = "FLEX_ATTENTION"
    impl_class = FlexAttentionImpl
    metadata_class = FlexAttentionMetadata
    builder_class = FlexAttentionMetadataBuilder
    capabilities = Capabilities(
        devices=(
            DeviceSupport(DeviceKind.CPU, ran_on=(X86,)),
            DeviceSupport(DeviceKind.CUDA, low=(7, 5), packages=("triton",), ran_on=(HOPPER,)),
            DeviceSupport(DeviceKind.ROCM, packages=("triton",)),
        ),
        dtypes=FLOATS,
        features=frozenset(Feature) - {Feature.CASCADE},
        refused={Feature.CASCADE: "reads a common prefix once for every sequence"},
        attention_types=tuple(AttentionType),
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Heads that do not fit a GPU's shared memory."""
        size = needs.spec.head_size * needs.dtype.itemsize
        if platform.kind is DeviceKind.CPU or size <= _MAX_HEAD_BYTES:
            return []
        return [f"a head of {size} bytes does not fit the shared memory: at most {_MAX_HEAD_BYTES}"]
