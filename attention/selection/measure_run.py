"""One backend on one batch: whether its numbers are right, and how long a layer takes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention.backend import AttentionBackend, AttentionImpl
from attention.kv_cache import KVCacheSpec, reshape_and_cache
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.platform import DeviceKind
from attention.selection.measurements import Shape
from attention.selection.reference import reference_attention
from attention.spec import AttentionNeeds, Feature, Phase

_LAYERS_PER_PLAN, _PLANS = 32, 3
_CPU_CACHE_BYTES, _MAX_CACHES = 64 << 20, 64
_FILL_BYTES = 64 << 20
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_FP8_TOLERANCE = 0.15
"""Some kernels round the queries and the weights to FP8 as well."""

_SLEEP_CYCLES = 4e9
"""Of a GPU's clock in a second, and as many again: launching is not always equally quick."""


class Run:
    """One backend on one batch, planned and warm.

    Attributes:
        planning: seconds that planning the batch takes.
        one_call: seconds of one layer, roughly.
    """

    def __init__(
        self, backend: type[AttentionBackend], needs: AttentionNeeds, phase: Phase, batch: Batch, device: torch.device
    ) -> None:
        self._batch, self._device = batch, device
        self._impl = _implementation(backend, needs, device)
        self._output = torch.empty_like(batch.query)
        self._builder = backend.builder_class(needs.spec, needs.dtype, needs.block_size, device)
        self._metadata = self._builder.build(batch.common)
        self._attend(batch.caches[0])  # compiles what it needs
        self.one_call = _seconds(lambda: self._attend(batch.caches[0]), device)
        self.planning = statistics.median(_seconds(self._plan, device) for _ in range(_PLANS))
        self._hidden_s = 0.0
        if phase is Phase.PREFILL or self._builder.graph_safe_decode:
            began = time.perf_counter()
            self._attend(batch.caches[0])
            self._hidden_s = (time.perf_counter() - began) * len(batch.caches)
            _synchronize(device)

    def seconds(self) -> float:
        """How long it takes to attend once over every cache."""
        return _seconds(self._all_caches, self._device, self._hidden_s)

    def _all_caches(self) -> None:
        for cache in self._batch.caches:
            self._attend(cache)

    def per_layer(self, seconds: float) -> float:
        """What a layer costs when all caches take that long."""
        return seconds / len(self._batch.caches) + self.planning / _LAYERS_PER_PLAN

    def _plan(self) -> None:
        self._metadata = self._builder.build(self._batch.common)

    def _attend(self, cache: torch.Tensor) -> None:
        batch = self._batch
        self._impl.forward(batch.query, batch.key, batch.value, cache, self._metadata, self._output)


@dataclass(frozen=True)
class Batch:
    """A batch with its tensors; every cache holds the whole context of all sequences."""

    common: CommonAttentionMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    caches: Sequence[torch.Tensor]


def draw(needs: AttentionNeeds, lens: Sequence[tuple[int, int]], device: torch.device, num_caches: int) -> Batch:
    """Random tensors and shuffled blocks for sequences of (new tokens, tokens in all)."""
    spec, block_size = needs.spec, needs.block_size
    needed = [-(-context // block_size) for _, context in lens]
    blocks = list(range(sum(needed)))
    random.Random(0).shuffle(blocks)
    tables = [[blocks.pop() for _ in range(n)] for n in needed]
    common = build_metadata([q for q, _ in lens], [c for _, c in lens], tables, block_size, device)
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(q for q, _ in lens)
    query, key, value = (
        torch.randn(tokens, heads, spec.head_size, generator=generator, device=device).to(needs.dtype)
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    )
    cache_spec = KVCacheSpec(
        tuple(range(num_caches)), spec.num_kv_heads, spec.head_size, block_size, spec.kv_cache_dtype or needs.dtype
    )
    cache = torch.empty(cache_spec.shape(sum(needed)), dtype=cache_spec.dtype, device=device)
    for part in cache.flatten(0, 1).split(max(1, _FILL_BYTES // cache[0, 0].numel() // 4)):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    return Batch(common, query, key, value, cache.unbind(0))


def _implementation(backend: type[AttentionBackend], needs: AttentionNeeds, device: torch.device) -> AttentionImpl:
    generator = torch.Generator(device).manual_seed(1)
    sinks = torch.randn(needs.spec.num_heads, generator=generator, device=device) if needs.spec.has_sinks else None
    return backend.impl_class(needs.spec, sinks)


def wrong_numbers(
    backend: type[AttentionBackend], needs: AttentionNeeds, phase: Phase, device: torch.device
) -> str | None:
    """What is wrong with a small batch's output; None when nothing is."""
    lens = [(1, 1), (1, 17), (1, 64), (1, 200)]
    if phase is Phase.PREFILL:
        lens = [(33, 33), (64, 64), (130, 130)]
        lens += [(5, 40), (48, 112)] if Feature.PREFIX in needs.all_features else []
    spec, batch = needs.spec, draw(needs, lens, device, num_caches=1)
    reshape_and_cache(batch.key, batch.value, cache := batch.caches[0].clone(), batch.common.slot_mapping)
    impl = _implementation(backend, needs, device)
    metadata = backend.builder_class(spec, needs.dtype, needs.block_size, device).build(batch.common)
    output = torch.full_like(batch.query, float("nan"))
    impl.forward(batch.query, batch.key, batch.value, batch.caches[0], metadata, output)
    expected = []
    for i, query in enumerate(batch.query.split([q for q, _ in lens])):
        table = batch.common.block_tables[i].long()
        tokens = cache.float()[table].transpose(0, 1).flatten(1, 2)[:, : lens[i][1]]
        expected.append(reference_attention(spec, query, tokens[0], tokens[1], impl.sinks))
    error = (output.float() - torch.cat(expected)).abs().max().item()
    tolerance = _FP8_TOLERANCE if spec.fp8_cache else _TOLERANCE[needs.dtype]
    return None if error <= tolerance else f"wrong numbers: off by {error:.2g}, {tolerance:g} are allowed"


def caches_to_rotate(needs: AttentionNeeds, shape: Shape, device: torch.device) -> int:
    """As many as are together twice as large as the device's cache."""
    spec = needs.spec
    one = KVCacheSpec((0,), spec.num_kv_heads, spec.head_size, needs.block_size, spec.kv_cache_dtype or needs.dtype)
    on_chip = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
    return min(_MAX_CACHES, -(-2 * on_chip // (one.bytes_per_token * shape.context_len * shape.num_seqs)))


def is_interpreted(backend: type[AttentionBackend], device: torch.device) -> bool:
    """Whether these are Triton kernels on a CPU: for tests, not for speed."""
    on_cpu = (support for support in backend.capabilities.devices if support.kind is DeviceKind.CPU)
    return device.type == "cpu" and any("triton" in support.packages for support in on_cpu)


def _seconds(run: Callable[[], object], device: torch.device, hidden_s: float = 0.0) -> float:
    """How long a call takes: by CUDA's events on a GPU, else by the clock.

    Args:
        run: the call.
        device: where it runs.
        hidden_s: a GPU is first kept busy for about so long, while the call's kernels are launched.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if hidden_s:
        torch.cuda._sleep(int(hidden_s * _SLEEP_CYCLES))
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
