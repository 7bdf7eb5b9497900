"""Experts of gpt-oss-20b kept in MXFP4, beside the same numbers in bfloat16: each product by every tile.

    python -m benchmarks.moe_mxfp4
    python -m benchmarks.moe_mxfp4 --tokens 16 64 --jobs 14

A measured product is one layer's, with random numbers and a random choice of four experts for each token, replayed as a
CUDA graph; what is read next is in no cache. Of the limit: the time that the weights of the chosen experts take in
MXFP4 at 4.2 TB/s. The numbers of every candidate are held against those of plain weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from attention.ops.triton.launch import device_traits
from benchmarks.device_timing import synchronize, time_calls
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.report import to_json, write_json
from workers.layers.activation import GatedActivation
from workers.layers.moe.grouped_linear import grouped_linear
from workers.layers.moe.grouped_weight import GroupedWeight, PlainWeight
from workers.layers.moe.mxfp4 import Mxfp4Weight
from workers.layers.moe.token_groups import TokenGroups, group_tokens
from workers.ops.mxfp4_tiles import Mxfp4Tile, mxfp4_stage_bytes
from workers.ops.mxfp4_words import to_exponents, to_words

HIDDEN, NUM_EXPERTS, TOP_K, NUM_LAYERS = 2880, 32, 4, 6
TOKENS = (1, 4, 16, 64, 256, 1024)
BANDWIDTH = 4.2e12
_ACTIVATION = GatedActivation("clamped_swiglu", 1.702, 7.0)
_ENOUGH_S, _WRONG = 0.006, 0.02

Which = Literal["gate_up", "down"]


def _tile(rows: int, outputs: int, inputs: int, stages: int, warps: int) -> Mxfp4Tile:
    return Mxfp4Tile(rows, outputs, inputs, 1 if rows == 16 else 4, stages, warps)


def _staying(rows: int, stages: int, programs: int) -> Mxfp4Tile:
    return Mxfp4Tile(rows, 64, 128, 1, stages, 4, 0, programs)


GATE_UP: Mapping[int, Sequence[Mxfp4Tile]] = {
    8: (_staying(8, 4, 4), _staying(8, 5, 4), _staying(8, 3, 5), _staying(8, 4, 5), _staying(8, 3, 6)),
    16: (
        _tile(16, 64, 128, 3, 4),
        _tile(16, 64, 128, 4, 4),
        _tile(16, 64, 128, 6, 4),
        _tile(16, 64, 256, 3, 4),
        _tile(16, 128, 128, 3, 8),
        _staying(16, 3, 4),
        _staying(16, 4, 4),
    ),
    32: (
        _tile(32, 64, 128, 3, 4),
        _tile(32, 128, 128, 3, 8),
        _staying(32, 3, 2),
        _staying(32, 4, 2),
        _staying(32, 3, 3),
    ),
    64: (_tile(64, 64, 128, 3, 4), _tile(64, 128, 128, 3, 8)),
    128: (_tile(128, 64, 128, 3, 4), _tile(128, 128, 128, 3, 8)),
}
DOWN: Mapping[int, Sequence[Mxfp4Tile]] = {
    8: (_staying(8, 3, 4), _staying(8, 4, 3), _staying(8, 4, 4), _staying(8, 5, 4), _staying(8, 4, 8)),
    16: (
        _tile(16, 64, 128, 3, 4),
        _tile(16, 64, 128, 4, 4),
        _tile(16, 64, 128, 6, 4),
        _tile(16, 64, 256, 3, 4),
        _tile(16, 64, 256, 4, 4),
        _tile(16, 128, 128, 4, 8),
        _staying(16, 3, 4),
        _staying(16, 4, 4),
    ),
    32: (
        _tile(32, 64, 256, 3, 4),
        _tile(32, 128, 128, 4, 8),
        _staying(32, 3, 3),
        _staying(32, 4, 3),
        _staying(32, 3, 4),
    ),
    64: (_tile(64, 64, 128, 4, 4), _tile(64, 128, 128, 4, 8), _tile(64, 256, 128, 3, 8)),
    128: (_tile(128, 128, 128, 3, 8), _tile(128, 256, 128, 2, 8)),
}
"""By the rows of a tile: of gate and up together, and of the second product."""
PREFETCHED = (0, 8, 32)
"""Of the second product for few tokens, whose experts are known before: blocks of 32 inputs."""
DEQUANTIZED = ((32, 256, 4), (64, 128, 4), (64, 256, 8), (16, 512, 4))
"""Outputs, inputs and warps of a program that dequantises."""


@dataclass(frozen=True)
class Layer:
    """The same numbers in both forms.

    Attributes:
        kept: of each product, in MXFP4.
        plain: of each product, in bfloat16.
    """

    kept: Mapping[Which, Mxfp4Weight]
    plain: Mapping[Which, PlainWeight]


def make_layer(device: torch.device) -> Layer:
    """Random numbers of a deviation of about 0.02."""
    kept: dict[Which, Mxfp4Weight] = {}
    shapes: dict[Which, int] = {"gate_up": 2 * HIDDEN, "down": HIDDEN}
    for which, rows in shapes.items():
        scales_shape = (NUM_EXPERTS, rows, HIDDEN // 32)
        blocks = torch.randint(0, 256, (*scales_shape, 16), dtype=torch.uint8, device=device)
        scales = torch.randint(119, 121, scales_shape, dtype=torch.uint8, device=device)
        bias = torch.randn(NUM_EXPERTS, rows, device=device).bfloat16() / 50
        kept[which] = Mxfp4Weight(to_words(blocks), to_exponents(scales), torch.bfloat16, bias)
    return Layer(kept, {which: weight.dequantized() for which, weight in kept.items()})


class Point:
    """One number of tokens: what was tried of both products.

    Args:
        layers: used in turn.
        num_tokens: T.
    """

    def __init__(self, layers: Sequence[Layer], num_tokens: int) -> None:
        self.num_tokens, self._layers = num_tokens, layers
        self._device = layers[0].kept["down"].device
        self._calls = []
        for layer in layers:
            x = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device=self._device)
            ids = torch.rand(num_tokens, NUM_EXPERTS, device=self._device).topk(TOP_K).indices
            groups = group_tokens(ids, NUM_EXPERTS)
            inner = self._product("gate_up", layer.plain["gate_up"], x, groups, None)
            self._calls.append((layer, groups, x, inner))
        self.experts = sum(float(groups.ids.unique().numel()) for _, groups, _, _ in self._calls) / len(layers)
        self.found: dict[Which, dict[str, Any]] = {}

    def _product(
        self, which: Which, weight: GroupedWeight, x: torch.Tensor, groups: TokenGroups, tile: Any
    ) -> torch.Tensor:
        order: Literal["pairs", "sorted"] = "pairs" if self.num_tokens == 1 else "sorted"
        if which == "gate_up":
            return grouped_linear(
                x, weight, groups, rows="tokens", out_rows=order, activation=_ACTIVATION, way="triton", tile=tile
            )
        return grouped_linear(x, weight, groups, rows=order, out_rows="pairs", routed_before=True, tile=tile)

    def _run(self, which: Which, kept: bool, tile: Any, call: tuple[Layer, TokenGroups, Any, Any]) -> torch.Tensor:
        layer, groups, x, inner = call
        weight = layer.kept[which] if kept else layer.plain[which]
        return self._product(which, weight, x if which == "gate_up" else inner, groups, tile)

    def bytes_read(self, which: Which) -> float:
        """Of the weights of the chosen experts, in MXFP4."""
        return self.experts * (2 if which == "gate_up" else 1) * HIDDEN * HIDDEN * 4.25 / 8

    def measure(self, which: Which, name: str, kept: bool, tile: Any = None) -> float:
        """Microseconds; infinite if it does not run, or is wrong."""
        found = self.found.setdefault(which, {"us": {}, "errors": {}})
        run = partial(self._run, which, kept, tile)
        try:
            exact = self._run(which, False, None, self._calls[0]).float()
            deviation = float((run(self._calls[0]).float() - exact).norm() / exact.norm())
            if not deviation < _WRONG:
                found["errors"][name] = f"deviates by {deviation:.3g}"
                return float("inf")
            calls: list[Callable[[], object]] = [partial(run, call) for call in self._calls]
            seconds = time_calls(calls, self._device, graph=True, enough_s=_ENOUGH_S).seconds
        except Exception as error:  # a candidate that this device cannot run is a result, too
            synchronize(self._device)
            found["errors"][name] = f"{type(error).__name__}: {error}"[:300]
            return float("inf")
        found["us"][name] = round(seconds * 1e6, 2)
        return seconds * 1e6

    def search(self) -> None:
        """Both forms by their tables, and all candidates."""
        products: dict[Which, Mapping[int, Sequence[Mxfp4Tile]]] = {"gate_up": GATE_UP, "down": DOWN}
        shared_memory = device_traits(self._device).shared_memory
        for which, tiles in products.items():
            self.measure(which, "bfloat16", kept=False)
            self.measure(which, "table", kept=True)
            best, fastest = None, float("inf")
            for tile in candidates(self.num_tokens, tiles):
                if mxfp4_stage_bytes(tile, which == "gate_up") * tile.num_stages > shared_memory:
                    continue
                took = self.measure(which, describe(tile), kept=True, tile=tile)
                if took < fastest:
                    best, fastest = tile, took
            if best is not None and which == "down" and self.num_tokens <= 64:
                for prefetched in PREFETCHED[1:]:
                    tile = replace(best, prefetched=prefetched)
                    self.measure(which, describe(tile), kept=True, tile=tile)
            if self.num_tokens >= 1024:
                self.dequantize(which)

    def dequantize(self, which: Which) -> None:
        """Into memory that is there already, by every shape."""
        from workers.ops.triton.mxfp4_linear import launch_dequantize_mxfp4

        found, layers = self.found[which], [layer for layer, _, _, _ in self._calls]
        out, times = torch.empty_like(layers[0].plain[which].weight), found.setdefault("dequantize_us", {})
        for shape in DEQUANTIZED:
            name = "x".join(map(str, shape))
            calls: list[Callable[[], object]] = [
                partial(launch_dequantize_mxfp4, out, layer.kept[which].words, layer.kept[which].exponents, shape)
                for layer in layers
            ]
            try:
                calls[0]()
                if not torch.equal(out, layers[0].plain[which].weight):
                    found["errors"][name] = "other numbers than the table's"
                    continue
                times[name] = round(time_calls(calls, self._device, graph=True, enough_s=_ENOUGH_S).seconds * 1e6, 2)
            except Exception as error:  # as of a product
                synchronize(self._device)
                found["errors"][name] = f"{type(error).__name__}: {error}"[:300]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        for which, found in self.found.items():
            found["us"] = dict(sorted(found["us"].items(), key=lambda item: item[1]))
            found["bytes"] = round(self.bytes_read(which))
            own = [us for name, us in found["us"].items() if name != "bfloat16"]
            found["of_bandwidth"] = round(self.bytes_read(which) / BANDWIDTH * 1e6 / min(own), 3) if own else 0.0
        found_of: dict[str, Any] = dict(self.found.items())
        return {"tokens": self.num_tokens, "experts": round(self.experts, 2), **found_of}


def candidates(num_tokens: int, tiles: Mapping[int, Sequence[Mxfp4Tile]]) -> list[Mxfp4Tile]:
    """Tiles to try for so many tokens."""
    mean = num_tokens * TOP_K / NUM_EXPERTS
    limits = {8: (0.3, 12.0), 16: (0.0, 40.0), 32: (4.0, 80.0), 64: (8.0, 1e9), 128: (30.0, 1e9), 256: (100.0, 1e9)}
    return [
        tile
        for rows, (begin, end) in limits.items()
        if begin <= mean < end
        for tile in tiles.get(rows, ())
        if num_tokens > 1 or not tile.staying  # of one token, pairs are not sorted
    ]


def describe(tile: Mxfp4Tile) -> str:
    """A tile in one word."""
    ahead = f"p{tile.prefetched}" if tile.prefetched else ""
    staying = f"c{tile.staying}" if tile.staying else ""
    return f"{tile.rows}x{tile.outputs}x{tile.inputs}s{tile.num_stages}w{tile.num_warps}{ahead}{staying}"


def compile_share(tokens: Sequence[int], index: int, num_shares: int) -> None:
    """Compile every `num_shares`-th candidate, so that what follows finds it in Triton's cache."""
    device = torch.device("cuda")
    shared_memory = device_traits(device).shared_memory
    words = torch.zeros(NUM_EXPERTS, HIDDEN // 32, 2 * HIDDEN, 8, dtype=torch.int16, device=device)
    exponents = torch.zeros(NUM_EXPERTS, -(-HIDDEN // 128), 2 * HIDDEN, dtype=torch.int32, device=device)
    bias = torch.zeros(NUM_EXPERTS, 2 * HIDDEN, dtype=torch.bfloat16, device=device)
    first = Mxfp4Weight(words, exponents, torch.bfloat16, bias)
    second = Mxfp4Weight(
        words[:, :, :HIDDEN].contiguous(),
        exponents[..., :HIDDEN].contiguous(),
        torch.bfloat16,
        bias[:, :HIDDEN].clone(),
    )
    layer = Layer({"gate_up": first, "down": second}, {})
    wanted: dict[tuple[Which, bool, Mxfp4Tile], None] = {}
    for num_tokens in tokens:
        products: dict[Which, Mapping[int, Sequence[Mxfp4Tile]]] = {"gate_up": GATE_UP, "down": DOWN}
        for which, tiles in products.items():
            for tile in candidates(num_tokens, tiles):
                if mxfp4_stage_bytes(tile, which == "gate_up") * tile.num_stages <= shared_memory:
                    wanted[which, num_tokens == 1, tile] = None
    for which, alone, tile in list(wanted)[index::num_shares]:
        x = torch.zeros(1 if alone else 2, HIDDEN, dtype=torch.bfloat16, device=device)
        ids = torch.arange(TOP_K, device=device).expand(x.shape[0], -1).contiguous()
        groups = group_tokens(ids, NUM_EXPERTS)
        order: Literal["pairs", "sorted"] = "pairs" if alone else "sorted"
        try:
            if which == "gate_up":
                rows: Any = {"rows": "tokens", "out_rows": order, "activation": _ACTIVATION}
                grouped_linear(x, layer.kept[which], groups, way="triton", tile=tile, **rows)
            else:
                inner = x.new_zeros(groups.num_pairs, HIDDEN)
                rows = {"rows": order, "out_rows": "pairs", "routed_before": True}
                grouped_linear(inner, layer.kept[which], groups, tile=tile, **rows)
        except Exception as error:  # measured later, where it is reported
            print(f"{which} {describe(tile)}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
    if max(tokens) >= 1024:
        from workers.ops.triton.mxfp4_linear import launch_dequantize_mxfp4

        for number, shape in enumerate(DEQUANTIZED):
            for place, weight in enumerate((first, second)):
                if (2 * number + place + len(wanted)) % num_shares == index:
                    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
                    launch_dequantize_mxfp4(out, weight.words, weight.exponents, shape)
    synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_mxfp4", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    parser.add_argument("--budget-s", type=float, default=60.0, help="no point is begun after so many seconds")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--compile-share", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "moe_mxfp4_h200.json", metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    begun = time.monotonic()
    environment = Environment.capture(threads=None)
    config = {"tokens": args.tokens, "bandwidth": BANDWIDTH, "gpus": gpu_names()}
    points: list[dict[str, Any]] = []
    with torch.inference_mode():
        if args.compile_share is not None:
            compile_share(args.tokens, *args.compile_share)
            return 0
        command = [sys.executable, "-m", "benchmarks.moe_mxfp4", "--tokens", *map(str, args.tokens), "--compile-share"]
        processes = [subprocess.Popen([*command, str(i), str(args.jobs)]) for i in range(args.jobs)]
        for process in processes:
            process.wait()
        print(f"compiled in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        layers = [make_layer(torch.device("cuda")) for _ in range(NUM_LAYERS)]
        for num_tokens in args.tokens:
            if time.monotonic() - begun > args.budget_s:
                print(f"no time left for {num_tokens} tokens", file=sys.stderr)
                continue
            point = Point(layers, num_tokens)
            point.search()
            points.append(point.to_json())
            write_json(args.output, to_json("moe_mxfp4", environment, config, {"points": points}))
            print_point(points[-1])
    print(f"{time.monotonic() - begun:.0f} s; {args.output}")
    return 0


def print_point(point: Mapping[str, Any]) -> None:
    """The fastest candidates of a point, the table's, and bfloat16's."""
    for which in ("gate_up", "down"):
        found = point[which]
        shown = [*list(found["us"].items())[:6], *((name, found["us"].get(name)) for name in ("table", "bfloat16"))]
        print(
            f"{point['tokens']} tokens, {point['experts']} experts, {which}, {found['of_bandwidth']:.0%} of bandwidth"
        )
        print("  " + ", ".join(f"{name} {us}" for name, us in shown), flush=True)
        if "dequantize_us" in found:
            print("  dequantising: " + ", ".join(f"{name} {us}" for name, us in found["dequantize_us"].items()))
        for name, error in found["errors"].items():
            print(f"  {name}: {error}")


if __name__ == "__main__":
    sys.exit(main())
