"""Which parts of the engine give a row the same bits whatever is in the batch with it, and what it costs to insist.

A part is called with the first n rows of one input, for several n. Batch sizes that give row 0 the same bits are a
class; a part with one class is batch-invariant. As a script it writes what it finds on this GPU as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PREFILL_SIZES = (256, 300, 512, 1000, 2048, 4096, 8192)
LAYERS = {  # (in, out) of Llama 3.1 8B
    "qkv_proj": (4096, 6144),
    "o_proj": (4096, 4096),
    "gate_up_proj": (4096, 28672),
    "down_proj": (14336, 4096),
    "lm_head": (4096, 128256),
}


def bits_of(rows: torch.Tensor) -> str:
    """A digest of a tensor's bytes."""
    return hashlib.sha256(rows.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:8]


def classes(run: Callable[[int], torch.Tensor], sizes: Sequence[int]) -> list[list[int]]:
    """Batch sizes by the bits of row 0."""
    found: dict[str, list[int]] = defaultdict(list)
    for size in sizes:
        found[bits_of(run(size)[0])].append(size)
    return list(found.values())


def rows_agree(run: Callable[[int], torch.Tensor], sizes: Sequence[int]) -> bool:
    """Whether every row has the same bits in every batch that has it."""
    largest = run(max(sizes)).clone()
    return all(torch.equal(run(size), largest[:size]) for size in sizes)


def microseconds(run: Callable[[], object], calls: int = 10, repeats: int = 9) -> float:
    """Median time of a call on the GPU, some calls behind each other in a CUDA graph: launching costs nothing."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[repeats // 2]


def linear(name: str, rows: int, dtype: torch.dtype, *, adds: bool) -> Callable[[int], torch.Tensor]:
    """A layer of `LAYERS` in the device's own library; `adds`: onto a residual, in one call."""
    generator = torch.Generator("cuda").manual_seed(len(name))
    num_in, num_out = LAYERS[name]
    x = torch.randn(rows, num_in, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(num_out, num_in, generator=generator, device="cuda") * 0.02).to(dtype)
    residual = torch.randn(rows, num_out, generator=generator, device="cuda").to(dtype) if adds else None

    def run(size: int) -> torch.Tensor:
        if residual is None:
            return F.linear(x[:size], weight)
        return torch.addmm(residual[:size], x[:size], weight.t())

    return run


def decode_attention(
    context: int, rows: int, num_splits: int | None, max_seq_len: int = 8192, group: int = 4
) -> Callable[[int], torch.Tensor]:
    """The split-KV kernel, 8 KV heads of 128 in bf16; `num_splits` None lets it choose as it does in the engine."""
    from attention.ops.triton.decode import paged_decode

    generator = torch.Generator("cuda").manual_seed(context)
    per_row = -(-context // 64)
    cache = torch.empty(per_row * rows, 2, 64, 8, 128, dtype=torch.bfloat16, device="cuda")
    cache.normal_(generator=generator)
    query = torch.randn(rows, 8 * group, 128, generator=generator, device="cuda").bfloat16()
    tables = torch.arange(per_row * rows, dtype=torch.int32, device="cuda").view(rows, per_row)
    lens = torch.full((rows,), context, dtype=torch.int32, device="cuda")

    def run(size: int) -> torch.Tensor:
        out = torch.empty_like(query[:size])
        paged_decode(
            query[:size], cache, tables[:size], lens[:size], max_seq_len, out, scale=0.088, num_splits=num_splits
        )
        return out

    return run


def prefill_attention(length: int, chunk: int | None, copies: int = 1) -> torch.Tensor:
    """Attention of one prompt over 8 KV heads of 128: whole, in chunks over the cache, or beside copies of itself."""
    from attention.ops.triton.prefill import paged_prefill, varlen_prefill
    from attention.ops.triton.reshape_and_cache import reshape_and_cache

    generator = torch.Generator("cuda").manual_seed(length)
    query, key, value = (
        torch.randn(length, heads, 128, generator=generator, device="cuda").bfloat16() for heads in (32, 8, 8)
    )
    out = torch.empty_like(query)
    if chunk is None:
        begins = torch.arange(copies + 1, dtype=torch.int32, device="cuda") * length
        outs = torch.empty(copies * length, 32, 128, dtype=query.dtype, device="cuda")
        tensors = [tensor.repeat(copies, 1, 1) for tensor in (query, key, value)]
        varlen_prefill(*tensors, begins, begins, length, outs, scale=0.088)
        return outs[:length]
    num_blocks = -(-length // 64)
    cache = torch.zeros(num_blocks, 2, 64, 8, 128, dtype=query.dtype, device="cuda")
    reshape_and_cache(key, value, cache, torch.arange(length, device="cuda"))
    table = torch.arange(num_blocks, dtype=torch.int32, device="cuda").view(1, -1)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        bounds = torch.tensor([0, end - start], dtype=torch.int32, device="cuda")
        lens = torch.tensor([end], dtype=torch.int32, device="cuda")
        paged_prefill(query[start:end], cache, bounds, lens, table, end - start, out[start:end], scale=0.088)
    return out


def fused_ops() -> dict[str, Callable[[int], torch.Tensor]]:
    """Norm, activation, and the greedy choice, at the sizes of Llama 3.1 8B."""
    from workers.ops.rms_norm import rms_norm
    from workers.ops.silu_and_mul import silu_and_mul

    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(8192, 4096, generator=generator, device="cuda").bfloat16()
    gate_up = torch.randn(8192, 28672, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(4096, generator=generator, device="cuda").bfloat16()
    return {
        "rms_norm": lambda size: rms_norm(x[:size], weight, 1e-5),
        "silu_and_mul": lambda size: silu_and_mul(gate_up[:size]),
    }


def times(run: Callable[[int], object], sizes: Sequence[int]) -> dict[int, float]:
    """Microseconds by batch size."""
    return {size: round(microseconds(partial(run, size)), 1) for size in sizes}


def measure_linear() -> dict[str, Any]:
    """Classes of batch sizes of every layer, and times in microseconds."""
    found: dict[str, Any] = {}
    for name in LAYERS:
        for dtype in (torch.bfloat16, torch.float32):
            sizes = DECODE_SIZES if name == "lm_head" else (*DECODE_SIZES, *PREFILL_SIZES[1:])
            run = linear(name, max(sizes), dtype, adds=name in ("o_proj", "down_proj"))
            entry: dict[str, Any] = {"classes": classes(run, sizes)}
            if dtype is torch.bfloat16:
                entry["us"] = times(run, [size for size in (1, 8, 64, 128, 256, 2048) if size in sizes])
            found[f"{name} {str(dtype)[6:]}"] = entry
            torch.cuda.empty_cache()
    return found


def measure_attention() -> dict[str, Any]:
    """Classes and times of decode, by the number of splits; of prefill, the tokens that differ from a prompt alone."""
    found: dict[str, Any] = {}
    for context in (200, 4064):
        for num_splits in (None, 1, 2, 4, 8):
            run = decode_attention(context, max(DECODE_SIZES), num_splits)
            found[f"decode {context} splits {num_splits}"] = {
                "classes": classes(run, DECODE_SIZES),
                "us": times(run, (1, 8, 16, 64, 256)),
            }
            torch.cuda.empty_cache()
    for length in (100, 700, 3000):
        whole = prefill_attention(length, None)
        ways = {
            **{f"in chunks of {chunk}": prefill_attention(length, chunk) for chunk in (length, 16, 256, 1000)},
            **{f"{copies} at a time": prefill_attention(length, None, copies) for copies in (2, 8)},
        }
        found[f"prefill {length}"] = {
            way: f"{int((out != whole).flatten(1).any(1).sum())} of {length} tokens differ" for way, out in ways.items()
        }
    return found


if __name__ == "__main__":
    if "cublaslt" in sys.argv:
        torch.backends.cuda.preferred_blas_library("cublaslt")
    if "full-reduction" in sys.argv:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    with torch.inference_mode():
        found = {"device": torch.cuda.get_device_name(), "settings": sys.argv[1:], "linear": measure_linear()}
        if len(sys.argv) == 1:
            found["attention"] = measure_attention()
            found["fused"] = {n: rows_agree(f, (*DECODE_SIZES, *PREFILL_SIZES)) for n, f in fused_ops().items()}
        print(json.dumps(found))
