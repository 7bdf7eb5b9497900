"""Every attention backend of this machine, side by side in one run: prefill in FLOP/s, paged decode in bytes/s.

    python -m benchmarks.attention                      all backends on the GPU, or on the CPU where there is none
    python -m benchmarks.attention --backend FLASHINFER --backend TRITON_ATTN

Rates are given as such and as fractions of this device's own copy bandwidth and matrix rate, measured in the same run.
Each output is checked against float64 on a part of the batch. Inputs are random; caches rotate, so that no second call
finds its keys in the device's cache.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attention.backend import AttentionBackend, AttentionMetadataBuilder
from attention.capability import Evidence
from attention.errors import AttentionBackendError
from attention.kv_cache import KVCacheSpec
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.ops.paged_attention import PagedAttention
from attention.platform import Platform
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import select_backend, unsupported_reasons
from attention.spec import AttentionNeeds, AttentionSpec, Phase
from benchmarks.device_timing import copy_bandwidth, matrix_rate, synchronize, time_calls
from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json

_NOT_ATTENTION = ("NO_ATTENTION",)
_ROTATE_BYTES, _MAX_CACHES = 256 << 20, 128
_CHECKED_QUERIES = 8
_WRONG = 0.03


@dataclass(frozen=True)
class Case:
    """A batch of equal sequences.

    Attributes:
        phase: of it.
        name: such as "64 × 4096".
        batch: sequences.
        query_len: tokens that each brings.
        context_len: tokens that each has with them.
        block_size: tokens in a KV block.
    """

    phase: Phase
    name: str
    batch: int
    query_len: int
    context_len: int
    block_size: int

    def flops(self, spec: AttentionSpec) -> float:
        """Two products with every visible pair of tokens in every query head."""
        prefix = self.context_len - self.query_len
        pairs = self.query_len * prefix + self.query_len * (self.query_len + 1) / 2
        return 4.0 * self.batch * pairs * spec.num_heads * spec.head_size

    def kv_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        """Keys and values of all sequences, once."""
        return 2 * self.batch * self.context_len * spec.num_kv_heads * spec.head_size * dtype.itemsize


def gpu_cases() -> list[Case]:
    """The full set."""
    prefill = [
        Case(Phase.PREFILL, "1 × 2048", 1, 2048, 2048, 64),
        Case(Phase.PREFILL, "8 × 4096", 8, 4096, 4096, 64),
        Case(Phase.PREFILL, "1 × 4096 + 512", 1, 512, 4608, 64),
        Case(Phase.PREFILL, "8 × 4096 + 512", 8, 512, 4608, 64),
    ]
    return [*prefill, *_decode_cases((1, 64, 256), (190, 2048, 4096, 32768), (16, 64))]


def cpu_cases() -> list[Case]:
    """What a CPU can do in a minute or two."""
    prefill = [Case(Phase.PREFILL, "1 × 512", 1, 512, 512, 16), Case(Phase.PREFILL, "1 × 512 + 128", 1, 128, 640, 16)]
    return [*prefill, *_decode_cases((1, 8, 32), (128, 1024, 4096), (16,))]


def _decode_cases(batches: Iterable[int], contexts: Sequence[int], blocks: Sequence[int]) -> list[Case]:
    return [
        Case(Phase.DECODE, f"{batch} × {context}", batch, 1, context, block)
        for batch in batches
        for context in contexts
        for block in blocks
    ]


class Inputs:
    """Random data for one case: several caches and new tokens, and one batch over shuffled blocks."""

    def __init__(self, case: Case, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> None:
        tokens = case.batch * case.query_len
        blocks_each = -(-case.context_len // case.block_size)
        num_blocks = case.batch * blocks_each
        size = KVCacheSpec((0,), spec.num_kv_heads, spec.head_size, case.block_size, dtype).bytes_per_block * num_blocks
        num_caches = max(1, min(_MAX_CACHES, math.ceil(_ROTATE_BYTES / size)))
        shape = AttentionBackend.get_kv_cache_shape(num_blocks, case.block_size, spec.num_kv_heads, spec.head_size)
        self.caches = [torch.randn(shape, device=device, dtype=dtype) for _ in range(num_caches)]
        self.query = torch.randn(tokens, spec.num_heads, spec.head_size, device=device, dtype=dtype)
        self.key, self.value = torch.randn(2, tokens, spec.num_kv_heads, spec.head_size, device=device, dtype=dtype)
        self.output = torch.empty_like(self.query)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).view(case.batch, blocks_each)
        self.batch: CommonAttentionMetadata = build_metadata(
            [case.query_len] * case.batch, [case.context_len] * case.batch, order.tolist(), case.block_size, device
        )


class Bench:
    """Times backends on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> None:
        self.device, self.dtype, self.spec = device, dtype, spec
        self.platform = Platform.of(device)
        self.bandwidth = copy_bandwidth(device)
        self.matrix_rate = matrix_rate(device, dtype)

    def run(self, case: Case, backends: Sequence[str]) -> list[dict[str, Any]]:
        """One row for each backend that does not refuse."""
        needs = AttentionNeeds(self.spec, self.dtype, case.block_size, case.phase)
        inputs = Inputs(case, self.spec, self.dtype, self.device)
        expected = self._reference(case, inputs)
        try:
            chosen = select_backend(self.platform, needs).backend.name
        except AttentionBackendError:
            chosen = ""
        rows = []
        for name in backends:
            if unsupported_reasons(name, self.platform, [needs]):
                continue
            try:
                row = self._measure(case, get_backend(name), inputs, expected)
            except Exception as error:  # one backend's failure must not lose the others' figures
                row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            rows.append({**asdict(case), "backend": name, "chosen": name == chosen, **row})
        return rows

    def _measure(
        self, case: Case, backend: type[AttentionBackend], inputs: Inputs, expected: torch.Tensor
    ) -> dict[str, Any]:
        builder = backend.builder_class(self.spec, self.dtype, case.block_size, self.device)
        impl = backend.impl_class(self.spec)
        metadata = builder.build(inputs.batch)
        decode = case.phase is Phase.DECODE
        key, value = (None, None) if decode else (inputs.key, inputs.value)
        inputs.output.fill_(float("nan"))
        impl.forward(inputs.query, key, value, inputs.caches[0], metadata, inputs.output)
        error = self._error(inputs, expected)
        calls = [
            lambda cache=cache: impl.forward(inputs.query, key, value, cache, metadata, inputs.output)
            for cache in inputs.caches
        ]
        timing = time_calls(calls, self.device, graph=decode)
        row = {**asdict(timing), "relative_error": error, "build_seconds": self._build_seconds(builder, inputs)}
        if decode:
            rate = case.kv_bytes(self.spec, self.dtype) / timing.seconds
            return {**row, "bytes_per_s": rate, "of_copy_bandwidth": rate / self.bandwidth}
        rate = case.flops(self.spec) / timing.seconds
        store = self._store_seconds(inputs)
        return {**row, "flops_per_s": rate, "of_matrix_rate": rate / self.matrix_rate, "store_seconds": store}

    def _build_seconds(self, builder: AttentionMetadataBuilder, inputs: Inputs) -> float:
        times = []
        for _ in range(5):
            synchronize(self.device)
            started = time.perf_counter()
            builder.build(inputs.batch)
            times.append(time.perf_counter() - started)
        return sorted(times)[2]

    def _store_seconds(self, inputs: Inputs) -> float:
        """What writing the new tokens to the cache takes by itself: every backend's `forward` does it, too."""
        calls = [
            lambda cache=cache: PagedAttention.write_to_paged_cache(
                inputs.key, inputs.value, cache, inputs.batch.slot_mapping
            )
            for cache in inputs.caches
        ]
        return time_calls(calls, self.device, graph=True).seconds

    def _reference(self, case: Case, inputs: Inputs) -> torch.Tensor:
        """What the last queries of the last sequence should give, in float64: (n, Hq, D)."""
        n = min(_CHECKED_QUERIES, case.query_len)
        table = inputs.batch.block_tables[-1].long()
        cached = inputs.caches[0][table].double()
        keys, values = (cached[:, i].flatten(0, 1)[: case.context_len] for i in (0, 1))
        if case.phase is Phase.PREFILL:
            keys = torch.cat((keys[: case.context_len - case.query_len], inputs.key[-case.query_len :].double()))
            values = torch.cat((values[: case.context_len - case.query_len], inputs.value[-case.query_len :].double()))
        group = self.spec.num_heads // self.spec.num_kv_heads
        query = inputs.query[-n:].double().unflatten(1, (self.spec.num_kv_heads, group))
        scores = torch.einsum("qhgd,khd->hgqk", query, keys) * self.spec.scale
        position = torch.arange(case.context_len - n, case.context_len, device=self.device)
        hidden = torch.arange(case.context_len, device=self.device)[None, :] > position[:, None]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2)

    def _error(self, inputs: Inputs, expected: torch.Tensor) -> float:
        found = inputs.output[-expected.shape[0] :].double()
        error = float((found - expected).norm() / expected.norm())
        if not error < _WRONG:
            raise ArithmeticError(f"wrong result: relative error {error:.3g}")
        return error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument(
        "--heads", type=int, nargs=3, metavar=("HQ", "HKV", "D"), help="default: 32 8 128, on a CPU 8 2 64"
    )
    parser.add_argument("--backend", action="append", help="only this one; may be repeated")
    parser.add_argument("--case", action="append", help="only this one, such as '64 × 4096'; may be repeated")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention_{device}.json")


def run(args: argparse.Namespace) -> Path:
    """Measure, print a line for each figure, and write the JSON file."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    heads = args.heads or ((32, 8, 128) if device.type == "cuda" else (8, 2, 64))
    num_heads, num_kv_heads, head_size = heads
    spec = AttentionSpec(num_heads, num_kv_heads, head_size, head_size**-0.5)
    environment = Environment.capture(threads=torch.get_num_threads() if device.type == "cpu" else None)
    bench = Bench(device, dtype, spec)
    print(f"{bench.platform}: copy {bench.bandwidth / 1e9:.0f} GB/s, product {bench.matrix_rate / 1e12:.1f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for case in gpu_cases() if device.type == "cuda" else cpu_cases():
        if args.case and case.name not in args.case:
            continue
        for row in bench.run(case, args.backend or _all_backends(bench.platform)):
            rows.append(row)
            print(_line(row), flush=True)
    config = {"device": str(bench.platform), "dtype": str(dtype).removeprefix("torch."), "heads": list(heads)}
    rates = {"copy_bytes_per_s": bench.bandwidth, "matrix_flops_per_s": bench.matrix_rate}
    out: Path = args.out or RESULTS / f"attention_{device.type}.json"
    write_json(out, to_json("attention", environment, config, {**rates, "rows": rows}))
    return out


def _all_backends(platform: Platform) -> list[str]:
    return [
        name
        for name in BACKENDS
        if name not in _NOT_ATTENTION
        and get_backend(name).capabilities.evidence(platform) in (Evidence.RAN, Evidence.ADAPTER)
    ]


def _line(row: dict[str, Any]) -> str:
    begin = f"{row['phase']:<8} {row['name']:<16} block {row['block_size']:<4} {row['backend']:<15}"
    if "error" in row:
        return f"{begin} {row['error']}"
    seconds = f"{row['seconds'] * 1e6:10.1f} µs ±{100 * row['spread']:.0f} %"
    if "bytes_per_s" in row:
        return f"{begin}{seconds} {row['bytes_per_s'] / 1e9:8.0f} GB/s {100 * row['of_copy_bandwidth']:5.1f} %"
    attention = row["flops_per_s"] * row["seconds"] / (row["seconds"] - row["store_seconds"])
    rates = f"{row['flops_per_s'] / 1e12:8.1f} TFLOP/s {100 * row['of_matrix_rate']:5.1f} %"
    return f"{begin}{seconds} {rates}, {attention / 1e12:.1f} without storing the cache"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.attention", description=__doc__.splitlines()[0])
    add_arguments(parser)
    print(run(parser.parse_args()))


if __name__ == "__main__":
    main()
