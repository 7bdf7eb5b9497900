"""One backend on one batch: whether its numbers are right, and how long a layer takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from attention.backend import AttentionBackend
from attention.platform import DeviceKind
from attention.selection.measured_batch import Batch, cache_of, draw, expected_output, implementation
from attention.selection.measurements import Shape
from attention.spec import AttentionNeeds, Feature, Phase

_LAYERS_PER_PLAN, _PLANS = 32, 3
_CPU_CACHE_BYTES, _MAX_CACHES = 64 << 20, 64
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
        self._impl = implementation(backend, needs.spec, batch)
        self._output = batch.output(needs.spec)
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


def wrong_numbers(
    backend: type[AttentionBackend], needs: AttentionNeeds, phase: Phase, device: torch.device
) -> str | None:
    """What is wrong with a small batch's output; None when nothing is."""
    lens = [(1, 1), (1, 17), (1, 64), (1, 200)]
    if phase is Phase.PREFILL:
        lens = [(33, 33), (64, 64), (130, 130)]
        lens += [(5, 40), (48, 112)] if Feature.PREFIX in needs.all_features else []
    spec, batch = needs.spec, draw(needs, lens, device, num_caches=1)
    expected = expected_output(needs, batch, lens)
    impl = implementation(backend, spec, batch)
    metadata = backend.builder_class(spec, needs.dtype, needs.block_size, device).build(batch.common)
    output = batch.output(spec)
    impl.forward(batch.query, batch.key, batch.value, batch.caches[0], metadata, output)
    error = (output.float() - expected).abs().max().item()
    tolerance = _FP8_TOLERANCE if spec.fp8_cache else _TOLERANCE[needs.dtype]
    return None if error <= tolerance else f"wrong numbers: off by {error:.2g}, {tolerance:g} are allowed"


def caches_to_rotate(needs: AttentionNeeds, shape: Shape, device: torch.device) -> int:
    """As many as are together twice as large as the device's cache."""
    one = cache_of(needs, 1)
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
