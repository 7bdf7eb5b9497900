"""Which backend is the fastest correct one on this device: runs them all on the shapes of a model's layers.

Only what does not refuse is run, and its numbers are compared with float32 before it is timed. What is timed is one
layer's call, on random data and on several caches in turn, so that none is still in the device's own cache, plus the
layer's share of planning the batch. Calls are timed as the model makes them, with the time to launch their kernels.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from attention.backend import AttentionBackend, AttentionImpl
from attention.errors import AttentionBackendError
from attention.kv_cache import KVCacheSpec, reshape_and_cache
from attention.measurements import Conditions, Excluded, Measurement, Record, Shape
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.platform import DeviceKind, Platform
from attention.priority import candidates
from attention.reference import reference_attention
from attention.registry import get_backend
from attention.selector import refusals
from attention.spec import FP8, AttentionNeeds, AttentionType, Feature, Phase

_LAYERS_PER_PLAN = 32
_MIN_REPEATS, _MAX_REPEATS, _ENOUGH_S, _TOO_SLOW_S, _FAR_BEHIND = 3, 50, 1.0, 10.0, 10
_CPU_CACHE_BYTES, _MAX_CACHES = 64 << 20, 64
_FILL_BYTES = 64 << 20
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_FP8_TOLERANCE = 0.15
"""Some kernels round the queries and the weights to FP8 as well."""

Report = Callable[[str], None]


def default_shapes(platform: Platform, phase: Phase) -> tuple[Shape, ...]:
    """What is measured if nobody says otherwise: prefill by length, with a chunk; decode by batch and context."""
    small = platform.kind is DeviceKind.CPU
    if phase is Phase.PREFILL:
        lengths, chunk = ((128, 512), Shape(1, 128, 512)) if small else ((512, 2048, 8192), Shape(1, 512, 4608))
        return (*(Shape(1, length, length) for length in lengths), chunk)
    batches, contexts = ((1, 8), (128, 1024)) if small else ((1, 16, 64), (512, 4096))
    return tuple(Shape(batch, 1, context) for batch in batches for context in contexts)


def measure(
    platform: Platform,
    device: torch.device,
    needs: AttentionNeeds,
    shapes: Mapping[Phase, Sequence[Shape]] | None = None,
    report: Report = lambda _: None,
) -> Record:
    """Check and time every candidate for one kind of layer, in both phases.

    Args:
        platform: what `device` is.
        device: where it runs.
        needs: the layer, a decoder's; its phase does not matter.
        shapes: of the batches; None: `default_shapes`.
        report: told each result in a line.

    Raises:
        AttentionBackendError: a simulated platform, a TPU, layers that cannot be measured, or too little memory.
    """
    if platform.simulated or platform.kind is DeviceKind.TPU:
        raise AttentionBackendError(f"nothing can be measured on {platform}")
    if needs.spec.mla is not None or needs.spec.attn_type is not AttentionType.DECODER:
        raise AttentionBackendError("only decoder layers with a cache of keys and values can be measured")
    measured: list[Measurement] = []
    excluded: list[Excluded] = []
    for phase in Phase:
        wanted = replace(needs, phase=phase)
        phase_shapes = shapes[phase] if shapes is not None else default_shapes(platform, phase)
        contest = _Contest(wanted, phase, device, report)
        contest.admit(name for name in candidates(platform, wanted) if not refusals(name, platform, [wanted]))
        for shape in phase_shapes:
            measured += contest.run(shape)
        excluded += contest.excluded
    return Record(Conditions.of(platform, needs), tuple(measured), tuple(excluded))


class _Contest:
    """The backends that are still in the running in one phase, and those that are out."""

    def __init__(self, needs: AttentionNeeds, phase: Phase, device: torch.device, report: Report) -> None:
        self.excluded: list[Excluded] = []
        self._needs, self._phase, self._device, self._report = needs, phase, device, report
        self._backends: list[type[AttentionBackend]] = []

    @torch.inference_mode()
    def admit(self, names: Iterable[str]) -> None:
        """Let those compete whose numbers are right."""
        for name in names:
            backend = get_backend(name)
            with self._excluding(backend, "a small batch"):
                if _interpreted(backend, self._device):
                    self._exclude(backend, "its kernels are interpreted here")
                elif wrong := _check(backend, self._needs, self._phase, self._device):
                    self._exclude(backend, wrong)
                else:
                    self._backends.append(backend)

    @torch.inference_mode()
    def run(self, shape: Shape) -> list[Measurement]:
        """Time all on the same data, in turn, so that whatever else the machine does hits them alike.

        Raises:
            AttentionBackendError: the data does not fit the device's free memory.
        """
        lens = [(shape.query_len, shape.context_len)] * shape.num_seqs
        try:
            batch = _draw(self._needs, lens, self._device, _caches_to_rotate(self._needs, shape, self._device))
        except torch.OutOfMemoryError as error:
            raise AttentionBackendError(f"{self._device} has too little free memory to measure {shape}") from error
        runs: dict[str, _Run] = {}
        for backend in list(self._backends):
            with self._excluding(backend, str(shape)):
                run = _Run(backend, self._needs, batch, self._device)
                if run.one_call > _TOO_SLOW_S:
                    self._exclude(backend, f"took {run.one_call:.0f} s at {shape}")
                else:
                    runs[backend.name] = run
        seconds = _in_turn(runs, self._device)
        found = [Measurement(name, self._phase, shape, seconds[name]) for name in runs]
        figures = ", ".join(f"{m.backend} {m.seconds * 1e3:.3f}" for m in sorted(found, key=lambda m: m.seconds))
        self._report(f"{self._phase} {shape}, ms: {figures}")
        return found

    @contextmanager
    def _excluding(self, backend: type[AttentionBackend], where: str) -> Iterator[None]:
        """Exclude the backend if anything goes wrong: a kernel library may raise whatever it likes."""
        try:
            yield
        except Exception as error:
            message = next(iter(str(error).splitlines()), "")
            self._exclude(backend, f"failed at {where}: {type(error).__name__}: {message:.200}")

    def _exclude(self, backend: type[AttentionBackend], reason: str) -> None:
        self._backends = [other for other in self._backends if other is not backend]
        self.excluded.append(Excluded(backend.name, self._phase, reason))
        self._report(f"{self._phase}: {backend.name} is out: {reason}")


class _Run:
    """One backend on one batch, planned and warm.

    Attributes:
        planning: seconds that planning the batch takes.
        one_call: seconds of one layer, roughly.
    """

    def __init__(
        self, backend: type[AttentionBackend], needs: AttentionNeeds, batch: _Batch, device: torch.device
    ) -> None:
        self._batch = batch
        self._impl = _implementation(backend, needs, device)
        self._output = torch.empty_like(batch.query)
        self._builder = backend.builder_class(needs.spec, needs.dtype, needs.block_size, device)
        self._metadata = self._builder.build(batch.common)
        self._attend(batch.caches[0])  # compiles what it needs
        self.one_call = _seconds(lambda: self._attend(batch.caches[0]), device)
        self.planning = statistics.median(_seconds(self._plan, device) for _ in range(_MIN_REPEATS))

    def all_caches(self) -> None:
        """Attend once over every cache."""
        for cache in self._batch.caches:
            self._attend(cache)

    def per_layer(self, seconds: float) -> float:
        """What a layer costs when `all_caches` takes that long."""
        return seconds / len(self._batch.caches) + self.planning / _LAYERS_PER_PLAN

    def _plan(self) -> None:
        self._metadata = self._builder.build(self._batch.common)

    def _attend(self, cache: torch.Tensor) -> None:
        batch = self._batch
        self._impl.forward(batch.query, batch.key, batch.value, cache, self._metadata, self._output)


@dataclass(frozen=True)
class _Batch:
    """A batch with its tensors; every cache holds the whole context of all sequences."""

    common: CommonAttentionMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    caches: Sequence[torch.Tensor]


def _draw(needs: AttentionNeeds, lens: Sequence[tuple[int, int]], device: torch.device, num_caches: int) -> _Batch:
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
        num_caches, spec.num_kv_heads, spec.head_size, block_size, spec.kv_cache_dtype or needs.dtype
    )
    cache = torch.empty(cache_spec.shape(sum(needed)), dtype=cache_spec.dtype, device=device)
    for part in cache.flatten(0, 1).split(max(1, _FILL_BYTES // cache[0, 0].numel() // 4)):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    return _Batch(common, query, key, value, cache.unbind(0))


def _implementation(backend: type[AttentionBackend], needs: AttentionNeeds, device: torch.device) -> AttentionImpl:
    generator = torch.Generator(device).manual_seed(1)
    sinks = torch.randn(needs.spec.num_heads, generator=generator, device=device) if needs.spec.has_sinks else None
    return backend.impl_class(needs.spec, sinks)


def _check(backend: type[AttentionBackend], needs: AttentionNeeds, phase: Phase, device: torch.device) -> str | None:
    """What is wrong with a small batch's output; None when nothing is."""
    lens = [(1, 1), (1, 17), (1, 64), (1, 200)]
    if phase is Phase.PREFILL:
        lens = [(33, 33), (64, 64), (130, 130)]
        lens += [(5, 40), (48, 112)] if Feature.PREFIX in needs.all_features else []
    spec, batch = needs.spec, _draw(needs, lens, device, num_caches=1)
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
    tolerance = _FP8_TOLERANCE if spec.kv_cache_dtype == FP8 else _TOLERANCE[needs.dtype]
    return None if error <= tolerance else f"wrong numbers: off by {error:.2g}, {tolerance:g} are allowed"


def _in_turn(runs: Mapping[str, _Run], device: torch.device) -> dict[str, float]:
    """Median seconds of a layer by backend. Who is far behind is not waited for more often than needed."""
    best = min((run.one_call for run in runs.values()), default=0.0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.perf_counter(), 0
    while runs and (rounds < _MIN_REPEATS or (rounds < _MAX_REPEATS and time.perf_counter() - began < _ENOUGH_S)):
        for name, run in runs.items():
            if rounds == 0 or run.one_call < _FAR_BEHIND * best:
                times[name].append(_seconds(run.all_caches, device))
        rounds += 1
    return {name: run.per_layer(statistics.median(times[name])) for name, run in runs.items()}


def _caches_to_rotate(needs: AttentionNeeds, shape: Shape, device: torch.device) -> int:
    """As many as are together twice as large as the device's cache."""
    spec = needs.spec
    one = KVCacheSpec(1, spec.num_kv_heads, spec.head_size, needs.block_size, spec.kv_cache_dtype or needs.dtype)
    on_chip = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
    return min(_MAX_CACHES, -(-2 * on_chip // (one.bytes_per_token * shape.context_len * shape.num_seqs)))


def _interpreted(backend: type[AttentionBackend], device: torch.device) -> bool:
    """Whether these are Triton kernels on a CPU: for tests, not for speed."""
    on_cpu = (support for support in backend.capabilities.devices if support.kind is DeviceKind.CPU)
    return device.type == "cpu" and any("triton" in support.packages for support in on_cpu)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes: by CUDA's events on a GPU, else by the clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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
