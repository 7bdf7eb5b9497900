"""Latent attention, every backend of this machine side by side: decode in bytes/s and FLOP/s, prefill in FLOP/s.

    python -m benchmarks.latent_attention

Kernels alone, without the products around them: decode reads latents of 512 + 64, prefill attends over expanded keys of
192 and values of 128. Caches rotate, so that no call finds its latents in the device's cache; calls are replayed as
CUDA graphs where they can be. With `--tiles` the tiles of Baton's own decode kernel are tried instead.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attention.backends.mla.expanding import DecodeBatch, Expanded, ExpandingBackend, ExpandingImpl, Packed
from attention.errors import AttentionBackendError
from attention.metadata import cumulative_lens
from attention.ops.triton.tuning import Tile
from attention.platform import Platform
from attention.selection.registry import get_backend
from attention.selection.selector import unsupported_reasons
from attention.spec import FP8, AttentionNeeds, AttentionSpec, MLASpec, Phase
from benchmarks.device_timing import copy_bandwidth, matrix_rate, time_calls
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.report import to_json, write_json

_MLA = MLASpec(512, 128, 64, 128)
_BACKENDS = ("TRITON_MLA", "FLASHINFER_MLA", "FLASH_ATTN_MLA", "FLASHMLA")
_CACHES_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """Equal sequences.

    Attributes:
        phase: of the batch.
        heads: Hq.
        batch: sequences.
        new: tokens that each brings.
        context: tokens that each has with them.
        fp8: whether the cache is FP8.
    """

    phase: Phase
    heads: int
    batch: int
    new: int
    context: int
    fp8: bool = False

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        return AttentionSpec(self.heads, 1, 576, 192**-0.5, mla=_MLA, kv_cache_dtype=FP8 if self.fp8 else None)

    @property
    def flops(self) -> float:
        """Operations of a call."""
        if self.phase is Phase.DECODE:
            return 2.0 * self.batch * self.heads * self.context * (576 + 512)
        pairs = self.new * (self.context - self.new) + self.new * (self.new + 1) / 2
        return 2.0 * self.batch * self.heads * pairs * (192 + 128)

    @property
    def bytes(self) -> float:
        """What a decode must read of the cache."""
        return float(self.batch * self.context * 576 * (1 if self.fp8 else 2))


_DECODES = ((1, 4096), (64, 190), (64, 4096), (8, 16000))
_PREFILLS = ((1, 2048), (1, 8000), (16, 2048), (8, 4096))
CASES = (
    *(Case(Phase.DECODE, heads, batch, 1, context) for heads in (16, 128) for batch, context in _DECODES),
    Case(Phase.DECODE, 16, 64, 1, 4096, fp8=True),
    Case(Phase.DECODE, 16, 256, 1, 190),
    *(Case(Phase.PREFILL, 16, batch, tokens, tokens) for batch, tokens in _PREFILLS),
    Case(Phase.PREFILL, 128, 1, 8192, 8192),
)
_TILES = {
    16: ((16, 32, 4, 2), (16, 32, 4, 3), (16, 32, 2, 3), (16, 64, 4, 2), (16, 64, 4, 3)),
    128: ((64, 64, 8, 2), (32, 64, 4, 2)),
}
"""Rows, keys, warps and stages of the decode kernel, by heads."""


def decode_call(case: Case, backend: type[ExpandingBackend], block_size: int) -> list[Callable[[], object]]:
    """Calls of a decode on caches of their own."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    blocks = -(-case.context // block_size)
    count = case.batch * blocks
    caches = max(2, min(16, int(_CACHES_BYTES // case.bytes)))
    tables = torch.randperm(count, device=device).view(case.batch, blocks).int()
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    batch = DecodeBatch(None, (case.context,) * case.batch, lens, tables)
    weight = torch.empty(case.heads * 256, 512, device=device, dtype=dtype)
    impl = backend.impl_class(case.spec, weight)
    assert isinstance(impl, ExpandingImpl)
    builder = backend.builder_class(case.spec, dtype, block_size, device)
    call = builder.plan_decode(batch)
    rotary = torch.randn(case.batch, case.heads, 64, device=device, dtype=dtype)
    query, rotary = impl.query_room(rotary)
    query.normal_()
    output = torch.empty(case.batch, case.heads, 512, device=device, dtype=dtype)
    made = [torch.randn(count, block_size, 576, device=device, dtype=dtype) for _ in range(caches)]
    if case.fp8:
        made = [cache.to(FP8) for cache in made]

    def attend(cache: torch.Tensor) -> None:
        impl.attend_latents(query, rotary, cache, batch, call, output)

    return [functools.partial(attend, cache) for cache in made]


def prefill_call(case: Case, backend: type[ExpandingBackend], block_size: int) -> list[Callable[[], object]]:
    """A call of a prefill, without the products that expand."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    lens = (case.new,) * case.batch
    cu_seqlens = cumulative_lens(lens, device)
    packed = Packed(cu_seqlens, cu_seqlens, lens, lens, True)
    tokens = sum(lens)
    impl = backend.impl_class(case.spec, torch.empty(case.heads * 256, 512, device=device, dtype=dtype))
    assert isinstance(impl, ExpandingImpl)
    call = backend.builder_class(case.spec, dtype, block_size, device).plan_attention(packed, 0)
    query = torch.randn(tokens, case.heads, 192, device=device, dtype=dtype)
    size = 192 if impl.joins_keys else 128
    key, value = (torch.randn(tokens, case.heads, n, device=device, dtype=dtype) for n in (size, 128))
    keys = Expanded(key, torch.randn(tokens, 64, device=device, dtype=dtype), value)
    output = torch.empty(tokens, case.heads, 128, device=device, dtype=dtype)
    return [lambda: impl.attend(query, keys, call, output, False)]


def measure(case: Case, name: str, block_size: int, limits: dict[str, float]) -> dict[str, Any]:
    """One backend at one point."""
    row: dict[str, Any] = {**vars(case), "phase": str(case.phase), "backend": name, "block_size": block_size}
    backend = get_backend(name)
    needs = AttentionNeeds(case.spec, torch.bfloat16, block_size, case.phase)
    reasons = unsupported_reasons(name, Platform.of("cuda"), [needs])
    if reasons:
        return {**row, "refused": reasons}
    assert issubclass(backend, ExpandingBackend)
    make = decode_call if case.phase is Phase.DECODE else prefill_call
    try:
        timing = time_calls(make(case, backend, block_size), torch.device("cuda"), graph=True)
    except (AttentionBackendError, RuntimeError, ValueError) as error:
        return {**row, "error": str(error)[:300]}
    return {**row, **_rates(case, timing.seconds, limits), "spread": timing.spread, "graph": timing.graph}


def _rates(case: Case, seconds: float, limits: dict[str, float]) -> dict[str, float]:
    rates = {"seconds": seconds, "flops_per_s": case.flops / seconds}
    if case.phase is Phase.DECODE:
        rates["of_bandwidth"] = case.bytes / seconds / limits["copy_bytes_per_s"]
    return {**rates, "of_matrix_rate": case.flops / seconds / limits["matrix_flops_per_s"]}


def try_tiles(limits: dict[str, float], block_size: int) -> Iterator[dict[str, Any]]:
    """Baton's decode kernel with other tiles."""
    for heads, batch, context in ((16, 64, 4096), (16, 256, 190), (16, 1, 4096), (128, 64, 4096)):
        case = Case(Phase.DECODE, heads, batch, 1, context)
        for shape in _TILES[heads]:
            for splits in (None, 2, 4) if batch == 64 and heads == 16 else (None,):
                yield _try_tile(case, Tile(*shape), splits, block_size, limits)


def _try_tile(case: Case, tile: Tile, splits: int | None, block_size: int, limits: dict[str, float]) -> dict[str, Any]:
    from attention.ops.triton.latent.decode import latent_decode

    device, dtype = torch.device("cuda"), torch.bfloat16
    blocks = -(-case.context // block_size)
    tables = torch.randperm(case.batch * blocks, device=device).view(case.batch, blocks).int()
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    query = torch.randn(case.batch, case.heads, 512, device=device, dtype=dtype)
    rotary = torch.randn(case.batch, case.heads, 64, device=device, dtype=dtype)
    output = torch.empty_like(query)
    caches = [torch.randn(case.batch * blocks, block_size, 576, device=device, dtype=dtype) for _ in range(3)]

    def call(cache: torch.Tensor) -> None:
        latent_decode(
            query,
            rotary,
            cache,
            tables,
            lens,
            case.context,
            output,
            scale=0.07,
            tile=tile,
            num_splits=splits,
        )

    row = {**vars(case), "phase": "decode", "tile": vars(tile), "splits": splits}
    try:
        timing = time_calls([functools.partial(call, cache) for cache in caches], device, graph=True)
    except Exception as error:  # a tile that does not compile is a finding, too
        return {**row, "error": str(error)[:200]}
    return {**row, **_rates(case, timing.seconds, limits)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("latent_attention", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--block-size", type=int, default=64, help="tokens in a KV block; default: 64")
    parser.add_argument("--tiles", action="store_true", help="try tiles of Baton's own decode kernel")
    parser.add_argument("--backends", nargs="+", choices=_BACKENDS, default=_BACKENDS, help="default: all")
    parser.add_argument(
        "--phase", choices=[str(phase) for phase in (Phase.DECODE, Phase.PREFILL)], help="only this one"
    )
    parser.add_argument("--run", default="", metavar="NAME", help="of the run that results belong to")
    parser.add_argument("--output", type=Path, default=RESULTS / "latent_attention_h200.json", metavar="FILE")
    args = parser.parse_args(argv)
    device = torch.device("cuda")
    environment = Environment.capture(threads=None)
    config = {"block_size": args.block_size, "run": args.run, "gpu_names": gpu_names()}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        limits = {"copy_bytes_per_s": copy_bandwidth(device), "matrix_flops_per_s": matrix_rate(device, torch.bfloat16)}
        torch.cuda.empty_cache()
        found = {"limits": limits, "rows": rows}
        cases = [case for case in CASES if args.phase in (None, str(case.phase))]
        every = (measure(case, name, args.block_size, limits) for case in cases for name in args.backends)
        for row in try_tiles(limits, args.block_size) if args.tiles else every:
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
            write_json(args.output, to_json("latent_attention", environment, config, found))
            torch.cuda.empty_cache()
    return 0


def _line(row: dict[str, Any]) -> str:
    what = f"{row['phase']} {row['heads']} heads {row['batch']}×{row['context']}{' fp8' if row['fp8'] else ''}"
    who = row.get("backend") or f"{list(row['tile'].values())} splits {row['splits']}"
    if "seconds" not in row:
        return f"{what} {who}: {row.get('error') or row.get('refused')}"
    share = f", {row['of_bandwidth']:.0%} of the bandwidth" if "of_bandwidth" in row else ""
    return f"{what} {who}: {row['seconds'] * 1e6:.1f} µs, {row['flops_per_s'] / 1e12:.0f} TFLOP/s{share}"


if __name__ == "__main__":
    sys.exit(main())
