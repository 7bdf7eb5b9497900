"""Attention of prompts, way by way: FlashAttention 4 with keys in one piece, in pages of each size and gathered first.

    python -m benchmarks.prefill_attention              about a minute on an H200, once kernels are compiled
    python -m benchmarks.prefill_attention --way 'FA4 own' --way FLASHINFER --case '1 × 2048'

Beside it FlashInfer, and FlashAttention 3 where a package brings it. Whole prompts, and chunks behind a prefix, of a
layer of 32 query and 8 KV heads of 128 in bfloat16. Every way stores the new keys first, as a layer does. A row has the
device's time (replayed as a CUDA graph), the time of calls in a row and the host's share of one call; its output is
compared with float32. From chunks follows how many query heads must see a key for gathering to pay.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attention.backend import AttentionMetadataBuilder
from attention.backends.common.batch_split import gather_kv, kv_rows
from attention.backends.flash_attn import FlashAttnMetadataBuilder, force_flash_attn_version, key_slots
from attention.backends.flash_attn.versions import Provider
from attention.platform import Platform
from attention.selection.reference import reference_attention
from attention.selection.registry import get_backend
from attention.selection.selector import unsupported_reasons
from attention.spec import AttentionNeeds, AttentionSpec, Feature, Phase
from benchmarks.attention import Case, Inputs
from benchmarks.device_timing import copy_bandwidth, matrix_rate, synchronize, time_calls
from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json

LAYER = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)
SPECIAL = {
    "window 1024": replace(LAYER, sliding_window=1024),
    "soft cap 50": replace(LAYER, logits_soft_cap=50.0),
    "sinks": replace(LAYER, has_sinks=True),
}
"""Layers with a feature, to be seen with `--features`: each is compiled anew by those who compile."""

_BLOCK = 64
_CHECKED_QUERIES, _WRONG = 8, 0.03
_HOST_CALLS = 10

Change = Callable[[Provider], Provider]


@dataclass(frozen=True)
class Way:
    """A way to compute the attention of a prompt.

    Attributes:
        name: of it.
        backend: whose.
        version: the generation of FlashAttention, where it is that.
        block_size: tokens in a KV block.
        change: what is different in the provider of FlashAttention.
        whole: whether it is for whole prompts (True), for chunks (False), or for both (None).
    """

    name: str
    backend: str
    version: int | None = None
    block_size: int = _BLOCK
    change: Change | None = None
    whole: bool | None = None


def _in_pages(provider: Provider) -> Provider:
    return replace(provider, gather_from=None, stale_rows=False)


def _gathered(provider: Provider) -> Provider:
    return replace(provider, gather_from=0)


WAYS = (
    Way("FA4 own", "FLASH_ATTN", 4, whole=True),
    Way("FA4 pages 16", "FLASH_ATTN", 4, 16, _in_pages, whole=False),
    Way("FA4 pages 64", "FLASH_ATTN", 4, 64, _in_pages, whole=False),
    Way("FA4 pages 128", "FLASH_ATTN", 4, 128, _in_pages, whole=False),
    Way("FA4 gathered", "FLASH_ATTN", 4, _BLOCK, _gathered, whole=False),
    Way("FA3 own", "FLASH_ATTN", 3, whole=True),
    Way("FA3 pages 64", "FLASH_ATTN", 3, whole=False),
    Way("TRITON_ATTN", "TRITON_ATTN"),
    Way("FLASHINFER", "FLASHINFER"),
)
"""What a plan does not choose by itself among them: pages of 128 as they are, which may let NaN of other rows in."""


def whole_prompts() -> list[Case]:
    """Prompts that come in one piece."""
    shapes = ((1, 500), (1, 2048), (4, 3000), (16, 2048), (1, 8000), (1, 20_000))
    return [Case(Phase.PREFILL, f"{batch} × {length}", batch, length, length, _BLOCK) for batch, length in shapes]


def chunks() -> list[Case]:
    """Chunks of long prompts."""
    return [
        Case(Phase.PREFILL, f"1 × ({prefix} + {length})", 1, length, prefix + length, _BLOCK)
        for length in (2048, 8192)
        for prefix in (8192, 16_384, 32_768)
    ]


class Bench:
    """Times ways on one device.

    Args:
        device: where.
        dtype: of everything.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.platform = device, dtype, Platform.of(device)

    def refusal(self, way: Way, spec: AttentionSpec) -> str:
        """Why a way is not one here; empty when it is."""
        needs = AttentionNeeds(spec, self.dtype, way.block_size, Phase.PREFILL, frozenset({Feature.PREFIX}))
        if way.version is None:
            return "; ".join(unsupported_reasons(way.backend, self.platform, [needs]))
        with force_flash_attn_version(way.version):
            return "; ".join(unsupported_reasons(way.backend, self.platform, [needs]))

    def rows(self, case: Case, ways: Sequence[Way], spec: AttentionSpec) -> Iterator[dict[str, Any]]:
        """A row for each way that is for such a case."""
        inputs: dict[int, Inputs] = {}
        for way in ways:
            if way.whole is not None and way.whole != (case.query_len == case.context_len):
                continue
            if way.block_size not in inputs:
                inputs = {
                    way.block_size: Inputs(replace(case, block_size=way.block_size), spec, self.dtype, self.device)
                }
            row = {**asdict(case), "block_size": way.block_size, "way": way.name}
            try:
                yield {**row, **self._row(case, way, spec, inputs[way.block_size])}
            except Exception as error:  # one way's failure must not lose the others' figures
                yield {**row, "error": f"{type(error).__name__}: {str(error)[:300]}"}

    def gather_seconds(self, case: Case, spec: AttentionSpec) -> float:
        """What copying all keys and values of a case out of their blocks takes."""
        inputs = Inputs(case, spec, self.dtype, self.device)
        offsets = torch.zeros_like(inputs.batch.cu_seqlens_q)
        torch.cumsum(inputs.batch.seq_lens, 0, out=offsets[1:])
        rows = kv_rows(key_slots(inputs.batch, offsets, case.block_size), case.block_size)
        calls = [lambda cache=cache: gather_kv(cache, rows) for cache in inputs.caches]
        return time_calls(calls, self.device, graph=True).seconds

    def _row(self, case: Case, way: Way, spec: AttentionSpec, inputs: Inputs) -> dict[str, Any]:
        builder = self._builder(way, spec)
        generator = torch.Generator(self.device).manual_seed(1)
        sinks = torch.randn(spec.num_heads, generator=generator, device=self.device) if spec.has_sinks else None
        impl = get_backend(way.backend).impl_class(spec, sinks)
        metadata = builder.build(inputs.batch)
        calls = [
            lambda cache=cache: impl.forward(inputs.query, inputs.key, inputs.value, cache, metadata, inputs.output)
            for cache in inputs.caches
        ]
        inputs.output.fill_(float("nan"))
        calls[0]()
        error = self._error(case, spec, inputs, sinks)
        eager = time_calls(calls, self.device)
        replayed = time_calls(calls, self.device, graph=True)
        flops = case.flops(spec)
        return {
            "seconds": replayed.seconds,
            "graph": replayed.graph,
            "eager_seconds": eager.seconds,
            "host_seconds": self._host_seconds(calls[0]),
            "relative_error": error,
            "flops_per_s": flops / replayed.seconds,
        }

    def _builder(self, way: Way, spec: AttentionSpec) -> AttentionMetadataBuilder:
        made = get_backend(way.backend).builder_class
        if way.version is None:
            return made(spec, self.dtype, way.block_size, self.device)
        with force_flash_attn_version(way.version):
            builder = made(spec, self.dtype, way.block_size, self.device)
        assert isinstance(builder, FlashAttnMetadataBuilder)
        if way.change is not None:
            builder.provider = way.change(builder.provider)
        return builder

    def _host_seconds(self, call: Callable[[], object]) -> float:
        """How long the host is busy with a call, by the least of several: the device must not keep it waiting."""
        least = float("inf")
        for _ in range(_HOST_CALLS):
            synchronize(self.device)
            began = time.perf_counter()
            call()
            least = min(least, time.perf_counter() - began)
        synchronize(self.device)
        return least

    def _error(self, case: Case, spec: AttentionSpec, inputs: Inputs, sinks: torch.Tensor | None) -> float:
        """Of the last queries of the last sequence, whose new keys the call has stored."""
        n = min(_CHECKED_QUERIES, case.query_len)
        cached = inputs.caches[0][inputs.batch.block_tables[-1].long()]
        keys, values = (cached[:, half].flatten(0, 1)[: case.context_len] for half in (0, 1))
        expected = reference_attention(spec, inputs.query[-n:], keys, values, sinks)
        error = float((inputs.output[-n:].float() - expected).norm() / expected.norm())
        if not error < _WRONG:
            raise ArithmeticError(f"wrong result: relative error {error:.3g}")
        return error


def gathering_pays_from(rows: Sequence[dict[str, Any]], spec: AttentionSpec) -> dict[str, float]:
    """By case, the query heads that must see a key for gathering to pay: `Provider.gather_from`.

    Reading pages of the block size takes longer by a share of the attention's own time, which is as long as there are
    pairs of query heads and keys; gathering takes as long as there are keys. A negative number: pages are no slower.
    """
    times = {(row["name"], row["way"]): row["seconds"] for row in rows if "seconds" in row}
    found = {}
    for row in rows:
        name, gather = row["name"], row.get("gather_seconds")
        paged, gathered = times.get((name, f"FA4 pages {_BLOCK}")), times.get((name, "FA4 gathered"))
        if gather is None or paged is None or gathered is None:
            continue
        heads = row["query_len"] * spec.num_heads / spec.num_kv_heads
        gain = paged - (gathered - gather)
        found[name] = heads * gather / gain if gain else float("inf")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--way", action="append", choices=[way.name for way in WAYS], help="only this one; repeatable")
    parser.add_argument("--case", action="append", help="only this one, such as '1 × 2048'; repeatable")
    parser.add_argument("--features", action="store_true", help="layers with a window, a soft cap and sinks, too")
    parser.add_argument("--budget", type=float, default=85.0, metavar="S", help="no row after so long (%(default)s)")
    parser.add_argument(
        "--output", type=Path, help="default: prefill_attention.json in the folder $OUT, else in benchmarks/results"
    )


def run(args: argparse.Namespace, cases: Sequence[Case] | None = None, spec: AttentionSpec = LAYER) -> Path:
    """Measure, print a line for each figure, and write the JSON file after every case."""
    device, began = torch.device(args.device), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    out: Path = args.output or Path(os.environ.get("OUT", RESULTS)) / "prefill_attention.json"
    environment = Environment.capture(threads=torch.get_num_threads() if device.type == "cpu" else None)
    bench = Bench(device, dtype)
    rates = {"copy_bytes_per_s": copy_bandwidth(device), "matrix_flops_per_s": matrix_rate(device, dtype)}
    print(f"{bench.platform}: copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, ", end="")
    print(f"product {rates['matrix_flops_per_s'] / 1e12:.1f} TFLOP/s")
    layers = {"": spec, **(SPECIAL if args.features else {})}
    cases = [case for case in cases or [*whole_prompts(), *chunks()] if not args.case or case.name in args.case]
    special = [case for case in cases if case.query_len >= 2048][:2]
    rows: list[dict[str, Any]] = []
    for layer, kind in layers.items():
        ways = [way for way in WAYS if not args.way or way.name in args.way]
        refused = {way.name: bench.refusal(way, kind) for way in ways}
        for name, why in refused.items():
            if why:
                print(f"{name} is left out{f' ({layer})' if layer else ''}: {why}")
        ways = [way for way in ways if not refused[way.name]]
        for case in special if layer else cases:
            rows += _measure(bench, case, ways, layer, kind, lambda: time.monotonic() - began > args.budget)
            found = {"rows": rows, "gathering_pays_from": gathering_pays_from(rows, spec)}
            config = {"device": str(bench.platform), "dtype": str(dtype).removeprefix("torch."), **asdict(spec)}
            write_json(out, to_json("prefill_attention", environment, config, {**rates, **found}))
    for name, heads in gathering_pays_from(rows, spec).items():
        print(f"{name}: gathering pays from {heads:.0f} query heads a key on")
    print(f"{time.monotonic() - began:.0f} s")
    return out


def _measure(
    bench: Bench, case: Case, ways: Sequence[Way], layer: str, spec: AttentionSpec, over: Callable[[], bool]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if over():
        print(f"{case.name}: left out, the time is over")
        return rows
    for row in bench.rows(case, ways, spec):
        if row["way"] == "FA4 gathered" and "error" not in row:
            row["gather_seconds"] = bench.gather_seconds(case, spec)
        rows.append({**row, "layer": layer})
        print(_line(rows[-1]), flush=True)
        if over():
            print("the time is over")
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    begin = f"{row['name']:<18} {row['layer']:<12} {row['way']:<14}"
    if "error" in row:
        return f"{begin} {row['error']}"
    times = " ".join(f"{row[key] * 1e6:9.1f}" for key in ("seconds", "eager_seconds", "host_seconds"))
    gather = f", gathering {row['gather_seconds'] * 1e6:.1f} µs" if "gather_seconds" in row else ""
    captured = "" if row["graph"] else ", not captured"
    return f"{begin} {times} µs (device, in a row, host) {row['flops_per_s'] / 1e12:7.1f} TFLOP/s{gather}{captured}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.prefill_attention", description=__doc__.splitlines()[0])
    add_arguments(parser)
    print(run(parser.parse_args()))


if __name__ == "__main__":
    main()
