"""What every launch needs to know: how a device computes, and whether the arguments fit the kernels."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from attention.errors import AttentionInputError

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter on the CPU; fixed when this package is first imported."""

MAX_HEAD_SIZE = 256

MAX_OFFSET = 2**31 - 1
"""What 32-bit offsets reach."""

_GLUON = ("3.6.", "3.7.")
"""Versions of Triton whose Gluon compiles the kernels that are written in it; run with 3.6."""

_DOT_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class DeviceTraits:
    """What decides how a kernel is launched.

    Attributes:
        arch: "sm90", "sm80", ... on CUDA; "hip" on ROCm; "xpu" on Intel's GPUs; "interpreter" on the
            CPU.
        num_sms: multiprocessors.
        shared_memory: bytes that one program may use.
        converts_e4m3: whether hardware converts float8_e4m3fn (CUDA from compute capability 8.9 on).
    """

    arch: str
    num_sms: int
    shared_memory: int
    converts_e4m3: bool


def _let_interpreter_loop() -> None:
    """Make Triton's interpreter (3.6) take its one-element arrays as loop bounds, which NumPy refuses from 2.4 on."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


if INTERPRETED:
    _let_interpreter_loop()


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of a device, asked for once; never waits for it."""
    if device.type == "cpu":
        return DeviceTraits("interpreter", 1, 1 << 30, False)
    if device.type == "xpu":
        return DeviceTraits("xpu", torch.xpu.get_device_properties(device).gpu_subslice_count, 64 << 10, False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return DeviceTraits("hip", properties.multi_processor_count, 64 << 10, False)
    capability = (properties.major, properties.minor)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    arch = f"sm{properties.major}{properties.minor}"
    return DeviceTraits(arch, properties.multi_processor_count, shared_memory, capability >= (8, 9))


def compiles_gluon(traits: DeviceTraits) -> bool:
    """Whether kernels in Gluon run on a device: they are for Hopper's instructions, and for few versions of Triton."""
    return traits.arch == "sm90" and triton.__version__.startswith(_GLUON)


def copies_rows(rows: torch.Tensor) -> bool:
    """Whether threads can copy 16 bytes of these rows at once: aligned, by strides that Triton compiles for.

    Triton distinguishes strides that are multiples of 16: here of 16-bit words, in which such kernels count.
    """
    strides = (stride * rows.element_size() for stride in rows.stride()[:-1])
    return rows.data_ptr() % 16 == 0 and all(stride % 32 == 0 for stride in strides)


def dot_dtype(query: torch.dtype, cache: torch.dtype) -> Any:
    """The Triton type of a dot's operands: the queries', but fp16 for bf16 queries over an FP8 cache.

    The interpreter, which has no bf16, computes in fp32.
    """
    if INTERPRETED:
        return tl.float32
    return tl.float16 if query == torch.bfloat16 and cache == torch.float8_e4m3fn else _DOT_DTYPES[query]


def kernel_view(cache: torch.Tensor) -> torch.Tensor:
    """The cache as kernels read it: an FP8 cache as bytes where hardware does not convert e4m3."""
    if cache.dtype == torch.float8_e4m3fn and not device_traits(cache.device).converts_e4m3:
        return cache.view(torch.uint8)
    return cache


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def check_device(tensor: torch.Tensor) -> None:
    """Refuse tensors of a device that Triton's kernels cannot read as they were compiled.

    Raises:
        AttentionInputError: a CPU tensor without the interpreter.
    """
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise AttentionInputError("Triton kernels run on cpu tensors only in Triton's interpreter (TRITON_INTERPRET=1)")


def check_heads(query: torch.Tensor, output: torch.Tensor, num_kv_heads: int, head_size: int) -> None:
    """Refuse queries that do not fit the keys, or an output that does not fit the queries.

    Args:
        query: (T, Hq, D).
        output: as the query.
        num_kv_heads: Hkv of the keys.
        head_size: D of the keys.

    Raises:
        AttentionInputError: with the value and the limit.
    """
    if query.dtype not in _DOT_DTYPES:
        raise AttentionInputError(f"queries are fp16, bf16 or fp32, not {query.dtype}")
    if query.ndim != 3 or query.shape[2] != head_size or not 1 <= head_size <= MAX_HEAD_SIZE:
        raise AttentionInputError(
            f"queries of shape {tuple(query.shape)} with keys of head size {head_size}: "
            f"needs (tokens, heads, head size) with one head size of at most {MAX_HEAD_SIZE}"
        )
    if num_kv_heads < 1 or query.shape[1] % num_kv_heads:
        raise AttentionInputError(f"{query.shape[1]} query heads do not divide among {num_kv_heads} key/value heads")
    if output.shape != query.shape:
        raise AttentionInputError(f"output of shape {tuple(output.shape)} for queries of {tuple(query.shape)}")
    if query.stride(2) != 1 or output.stride(2) != 1:
        raise AttentionInputError("the elements of a head of query and output must be contiguous")
    check_span("a token's queries", query, 2)
    check_span("a token's output", output, 2)
    check_device(query)


def check_cache(kv_cache: torch.Tensor) -> None:
    """Refuse a cache that is not (num_blocks, 2, block_size, Hkv, D) with blocks of a power of two.

    Raises:
        AttentionInputError: with the value and the limit.
    """
    if kv_cache.ndim != 5 or kv_cache.shape[1] != 2 or kv_cache.stride(4) != 1:
        raise AttentionInputError(
            f"a KV cache is (num_blocks, 2, block_size, Hkv, D) with contiguous heads, not {tuple(kv_cache.shape)} "
            f"with strides {kv_cache.stride()}"
        )
    block_size = kv_cache.shape[2]
    if block_size & (block_size - 1):
        raise AttentionInputError(f"block size {block_size} is not a power of two")
    check_span("a block of the KV cache", kv_cache, 4)


def check_indices(**indices: torch.Tensor) -> None:
    """Refuse block tables, lengths and offsets that kernels would read as something else.

    Raises:
        AttentionInputError: anything but int32 with contiguous rows; says which.
    """
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            raise AttentionInputError(
                f"{name} of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}: needs int32 with contiguous rows"
            )


def check_span(name: str, tensor: torch.Tensor, dims: int) -> None:
    """Refuse a tensor whose last `dims` dimensions reach further than kernels count in 32 bits.

    Blocks and tokens are found by 64-bit offsets; what lies inside of one by 32-bit ones.

    Raises:
        AttentionInputError: with the reach and the limit.
    """
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape[-dims:], tensor.stride()[-dims:], strict=True))
    if reach > MAX_OFFSET:
        raise AttentionInputError(f"{name} reach over {reach} elements: at most {MAX_OFFSET}")


def check_logits(scale: float, soft_cap: float | None, sliding_window: int | None) -> None:
    """Refuse factors that a softmax kernel cannot use.

    Raises:
        AttentionInputError: with the value and the limit.
    """
    if not scale > 0:
        raise AttentionInputError(f"scale {scale} is not positive")
    if soft_cap is not None and not soft_cap > 0:
        raise AttentionInputError(f"soft cap {soft_cap} is not positive")
    if sliding_window is not None and sliding_window < 1:
        raise AttentionInputError(f"a sliding window holds at least 1 token, not {sliding_window}")
