"""Mixtures of experts in the shapes of published models: which tiles and which way are fastest for so many tokens.

    python -m benchmarks.moe
    python -m benchmarks.moe --tokens 256 8192 32768
    python -m benchmarks.moe --kernels 256

A measured block is router, experts and their sum, with random weights and inputs, replayed as a CUDA graph; what is
read next is in no cache. Of the limit: the time that the weights of the chosen experts take at 4.26 TB/s, or their
products at 780 TFLOP/s, whichever is more. `--kernels` lists the kernels of a block and their times, with and without
dependent launches: with them a kernel's time contains that it waits for the one before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from attention.ops.triton.dependent_launch import launches_dependents
from attention.ops.triton.launch import device_traits
from benchmarks.device_timing import synchronize, time_calls
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.moe_flashinfer import flashinfer_candidates
from benchmarks.moe_layers import (
    LAYERS,
    SUMS,
    MoELayerShape,
    all_tiles,
    candidates,
    describe,
    fitting,
    make_block,
    run_block,
)
from benchmarks.report import to_json, write_json
from workers.layers.moe.block import MoEBlock
from workers.layers.moe.token_groups import group_tokens, sort_pairs
from workers.ops.triton.token_groups import launch_tile_map

Run = Callable[[MoEBlock, torch.Tensor], torch.Tensor]

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 32768)
BANDWIDTH, RATE = 4.26e12, 780e12
_ENOUGH_S = 0.02
_MOST_CHECKED = 8192
_WRONG = 0.02


class Point:
    """One number of tokens of one layer: what was tried, and the fastest of it.

    Args:
        shape: of the layer.
        blocks: some layers, used in turn.
        num_tokens: T.
    """

    def __init__(self, shape: MoELayerShape, blocks: Sequence[MoEBlock], num_tokens: int) -> None:
        device = blocks[0].router.weight.device
        num_calls = 6 if num_tokens <= 64 else 3 if num_tokens <= 1024 else 2
        self.shape, self.num_tokens, self.device = shape, num_tokens, device
        self._calls = [
            (blocks[i % len(blocks)], torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device))
            for i in range(num_calls)
        ]
        chosen = [float(block.router(x)[0].unique().numel()) for block, x in self._calls]
        self.experts = sum(chosen) / len(chosen)
        self.bytes = self.experts * shape.expert_bytes
        self.flops = float(num_tokens * shape.token_flops)
        self.us: dict[str, float] = {}
        self.deviations: dict[str, float] = {}
        self.errors: dict[str, str] = {}
        block, x = self._calls[0]
        self._exact = run_block(block, x, way="loop").float() if num_tokens <= _MOST_CHECKED else None

    @property
    def limit_us(self) -> float:
        """What memory and matrix units allow."""
        return 1e6 * max(self.bytes / BANDWIDTH, self.flops / RATE)

    def measure(self, name: str, run: Run) -> float:
        """Microseconds of a block; infinite if it does not run, or is wrong."""
        try:
            if self._exact is not None:
                found = run(*self._calls[0]).float()
                deviation = float((found - self._exact).norm() / self._exact.norm())
                self.deviations[name] = round(deviation, 5)
                if not deviation < _WRONG:
                    self.errors[name] = f"deviates by {deviation:.3g}"
                    return float("inf")
            calls = [partial(run, block, x) for block, x in self._calls]
            seconds = time_calls(calls, self.device, graph=True, enough_s=_ENOUGH_S).seconds
        except Exception as error:  # a candidate that this device cannot run is a result, too
            synchronize(self.device)
            self.errors[name] = f"{type(error).__name__}: {error}"[:300]
            return float("inf")
        self.us[name] = round(seconds * 1e6, 2)
        return seconds * 1e6

    def routing_us(self, by_torch: bool = False) -> float:
        """Of the router and the groups alone, sorted by the kernels or by `torch.sort`."""
        num_experts, rows = self.shape.num_experts, 16 if self.num_tokens <= 64 else 128

        def route(block: MoEBlock, x: torch.Tensor) -> torch.Tensor:
            ids, _ = block.router(x)
            if by_torch:
                return launch_tile_map(sort_pairs(ids, num_experts)[1], ids.numel(), rows)
            return ids if x.shape[0] == 1 else group_tokens(ids, num_experts).tiles(rows)

        calls = [partial(route, block, x) for block, x in self._calls]
        return round(time_calls(calls, self.device, graph=True, enough_s=_ENOUGH_S).seconds * 1e6, 2)

    def search(self, with_flashinfer: bool) -> None:
        """Try all candidates: of two products' tiles first one's, then the other's beside the best."""
        self.measure("table", lambda block, x: block(x))
        shared_memory = device_traits(self.device).shared_memory
        for firsts, seconds in candidates(self.shape, self.num_tokens):
            tried = [tile for each in firsts if (tile := fitting(each, True, shared_memory)) is not None]
            others: list[Any] = [tile for each in seconds if (tile := fitting(each, False, shared_memory)) is not None]
            if self.num_tokens == 1:
                others = [*SUMS, others[0]]
            best, fastest = tried[0], float("inf")
            for first in tried:
                took = self._try(first, others[0])
                if took < fastest:
                    best, fastest = first, took
            for second in others[1:]:
                self._try(best, second)
        if self.num_tokens >= 64:
            self.measure("torch", partial(run_block, way="torch"))
            if with_flashinfer:
                for name, run in flashinfer_candidates(self.shape, [block for block, _ in self._calls]).items():
                    self.measure(f"flashinfer {name}", run)

    def _try(self, first: Any, second: Any) -> float:
        return self.measure(f"{describe(first)} {describe(second)}", partial(run_block, first=first, second=second))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tokens": self.num_tokens,
            "experts": round(self.experts, 2),
            "limit_us": round(self.limit_us, 2),
            "routing_us": self.routing_us(),
            "routing_torch_us": self.routing_us(by_torch=True),
            "us": dict(sorted(self.us.items(), key=lambda item: item[1])),
            "deviations": self.deviations,
            "errors": self.errors,
        }


def measure_layers(names: Sequence[str], tokens: Sequence[int], deadline: float, flashinfer: bool) -> dict[str, Any]:
    """By name of the layer its points, as many as are begun before the deadline."""
    device = torch.device("cuda")
    found: dict[str, Any] = {name: [] for name in names}
    for name in names:
        blocks = [make_block(LAYERS[name], device) for _ in range(3)]
        for num_tokens in tokens:
            if time.monotonic() > deadline:
                print(f"{name}: no time left for {num_tokens} tokens", file=sys.stderr)
                continue
            point = Point(LAYERS[name], blocks, num_tokens)
            point.search(flashinfer)
            found[name].append(point.to_json())
            print_point(name, found[name][-1])
            del point
            torch.cuda.empty_cache()
        del blocks
    return found


def print_point(name: str, point: dict[str, Any]) -> None:
    """The fastest candidates of a point, the table's, and the best of every library."""
    us, limit = point["us"], point["limit_us"]
    shown = [*list(us.items())[:4], *((each, us[each]) for each in ("table", "torch") if each in us)]
    shown += [(each, took) for each, took in us.items() if each.startswith("flashinfer")][:1]
    routing = f"{point['routing_us']} us, with torch.sort {point['routing_torch_us']}"
    print(f"{name} {point['tokens']} tokens, {point['experts']} experts, limit {limit} us, routing {routing} us")
    for each, took in dict(shown).items():
        print(f"    {took:10.2f} us  {100 * limit / took:5.1f}%  {each}")
    for each, error in point["errors"].items():
        print(f"    {each}: {error}")
    sys.stdout.flush()


def list_kernels(name: str, num_tokens: int) -> None:
    """The kernels of one block, from a replayed graph: how often, and microseconds of each."""
    device = torch.device("cuda", torch.cuda.current_device())
    blocks = [make_block(LAYERS[name], device) for _ in range(3)]
    x = torch.randn(num_tokens, LAYERS[name].hidden_size, dtype=torch.bfloat16, device=device)
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    for column, context in (("dependent", _as_they_are), ("one by one", _without_dependent_launches)):
        with context(device):
            for block in blocks:
                block(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for block in blocks * 2:
                    block(x)
            graph.replay()
            synchronize(device)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(5):
                    graph.replay()
                synchronize(device)
        runs = 5 * 2 * len(blocks)
        for event in profile.key_averages():
            if event.self_device_time_total:
                mean = event.self_device_time_total / event.count
                columns.setdefault(event.key, {})[column] = (event.count / runs, mean)
    print(f"{name}, {num_tokens} tokens: of a block, times and microseconds each")
    for kernel, found in columns.items():
        cells = [
            f"{found[c][0]:4.1f} x {found[c][1]:8.2f}" if c in found else " " * 15 for c in ("dependent", "one by one")
        ]
        print(f"    {'   '.join(cells)}   {kernel[:90]}")


@contextmanager
def _as_they_are(device: torch.device) -> Iterator[None]:
    yield


@contextmanager
def _without_dependent_launches(device: torch.device) -> Iterator[None]:
    """As if the device had none."""
    launches_dependents.cache_clear()
    with mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)):
        launches_dependents(device)
    try:
        yield
    finally:
        launches_dependents.cache_clear()


def compile_share(names: Sequence[str], tokens: Sequence[int], index: int, num_shares: int) -> None:
    """Compile every so manieth candidate, so that Triton's cache has it."""
    device = torch.device("cuda")
    shared_memory = device_traits(device).shared_memory
    for name in names:
        shape, runs = LAYERS[name], []
        for first, second in all_tiles(shape, tokens):
            if fitting(first, True, shared_memory) and fitting(second, False, shared_memory):
                runs.append(partial(run_block, first=first, second=second))
        block = make_block(shape, device, filled=False)
        several, one = (torch.zeros(n, shape.hidden_size, dtype=torch.bfloat16, device=device) for n in (2, 1))
        calls = [partial(run, block, several) for run in runs]
        if 1 in tokens:
            calls += [partial(run, block, one) for run in runs if run.keywords["first"].rows == 16]
            calls += [partial(run_block, block, one, second=tile) for tile in SUMS]
        for call in calls[index::num_shares]:
            try:
                call()
            except Exception as error:  # measured later, where it is reported
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        del block
    synchronize(device)


def compile_all(names: Sequence[str], tokens: Sequence[int], jobs: int) -> None:
    """Compile all candidates in processes side by side."""
    command = [sys.executable, "-m", "benchmarks.moe", "--layers", *names, "--tokens", *map(str, tokens)]
    processes = [subprocess.Popen([*command, "--compile-share", str(i), str(jobs)]) for i in range(jobs)]
    for process in processes:
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="NAME")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    listed = "list the kernels of blocks of 1, 16 and 64 tokens, or of so many"
    parser.add_argument("--kernels", type=int, nargs="*", metavar="N", help=listed)
    parser.add_argument("--no-flashinfer", action="store_true", help="leave FlashInfer's fused kernels out")
    parser.add_argument("--budget-s", type=float, default=110.0, help="no point is begun after so many seconds")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--compile-share", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "moe.json", metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    begun = time.monotonic()
    with torch.inference_mode():
        if args.compile_share is not None:
            compile_share(args.layers, args.tokens, *args.compile_share)
            return 0
        if args.kernels is not None:
            for name in args.layers:
                for num_tokens in args.kernels or (1, 16, 64):
                    list_kernels(name, num_tokens)
            return 0
        compile_all(args.layers, args.tokens, args.jobs)
        print(f"compiled in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        layers = measure_layers(args.layers, args.tokens, begun + args.budget_s, not args.no_flashinfer)
    environment = Environment.capture(threads=None)
    config = {"tokens": args.tokens, "bandwidth": BANDWIDTH, "rate": RATE, "gpus": gpu_names()}
    write_json(args.output, to_json("moe", environment, config, {"layers": layers}))
    print(f"{time.monotonic() - begun:.0f} s; {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
