"""Which backend is the fastest correct one on this device: runs them all on the shapes of a model's layers.

Only what does not refuse is run, and its numbers are compared with float32 before it is timed. What is timed is one
layer's call, on random data and on several caches in turn, so that none is still in the device's own cache, plus the
layer's share of planning the batch. Calls are timed as the model makes them: with the time to launch their kernels,
unless it is hidden, as in prefill, where the host is ahead of the device, and in decode that is replayed.

All of it has a time budget: a backend that compiles for too long, or is far behind the best, is out with the reason.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from attention.backend import AttentionBackend
from attention.broken import in_a_line
from attention.errors import AttentionBackendError
from attention.platform import DeviceKind, Platform
from attention.selection.measure_run import Run, caches_to_rotate, is_interpreted, wrong_numbers
from attention.selection.measured_batch import Batch, draw
from attention.selection.measurements import Conditions, Excluded, Measurement, Record, Shape
from attention.selection.priority import candidates
from attention.selection.registry import get_backend
from attention.selection.selector import unsupported_reasons
from attention.selection.time_limit import TimeLimitError, time_limit
from attention.spec import AttentionNeeds, AttentionType, Phase

BUDGET_S = 100.0
"""Seconds for measuring one kind of layer, if nobody says otherwise."""

_MIN_REPEATS, _MAX_REPEATS, _FAR_BEHIND = 3, 50, 10
ENOUGH_S = 1.0
"""After so long a shape's calls are not repeated more often than the least number of times."""
TOO_SLOW_S = 10.0
"""A backend that takes longer for one call is out at this shape."""
FIRST_CALL_S, _NEXT_SHAPE_S = 60.0, 15.0
"""How long a backend may take to be ready: at its first batch, where its kernels are compiled, and at another shape."""
_HOPELESS, HOPELESS_S = 20, 0.1
"""A backend so many times slower than the best is out, if a call takes that long: else it costs nothing to go on."""

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
    budget_s: float = BUDGET_S,
) -> Record:
    """Check and time every candidate for one kind of layer, in both phases.

    Decode comes first, which has less to compile: when time is short, both phases are measured.

    Args:
        platform: what `device` is.
        device: where it runs.
        needs: the layer, a decoder's; its phase does not matter.
        shapes: of the batches; None: `default_shapes`.
        report: told what is done, and each result, in a line.
        budget_s: seconds after which whatever has not been tried is left out, with that reason. On the main thread a
            backend that is compiling is interrupted.

    Raises:
        AttentionBackendError: a simulated platform, a TPU, layers that cannot be measured, or too little memory.
    """
    if platform.simulated or platform.kind is DeviceKind.TPU:
        raise AttentionBackendError(f"nothing can be measured on {platform}")
    if needs.spec.attn_type is not AttentionType.DECODER:
        raise AttentionBackendError("only decoder layers can be measured")
    measured: dict[Phase, list[Measurement]] = {}
    excluded: dict[Phase, list[Excluded]] = {}
    deadline = time.monotonic() + budget_s
    for phase in (Phase.DECODE, Phase.PREFILL):
        wanted = replace(needs, phase=phase)
        phase_shapes = shapes[phase] if shapes is not None else default_shapes(platform, phase)
        contest = _Contest(wanted, phase, device, report, deadline)
        contest.admit(
            name for name in candidates(platform, wanted) if not unsupported_reasons(name, platform, [wanted])
        )
        measured[phase] = [measurement for shape in phase_shapes for measurement in contest.run(shape)]
        excluded[phase] = contest.excluded
    return Record(
        Conditions.of(platform, needs),
        tuple(measurement for phase in Phase for measurement in measured[phase]),
        tuple(out for phase in Phase for out in excluded[phase]),
    )


class _Contest:
    """The backends that are still in the running in one phase, and those that are out."""

    def __init__(
        self, needs: AttentionNeeds, phase: Phase, device: torch.device, report: Report, deadline: float
    ) -> None:
        self.excluded: list[Excluded] = []
        self._needs, self._phase, self._device, self._report = needs, phase, device, report
        self._deadline = deadline
        self._backends: list[type[AttentionBackend]] = []

    @torch.inference_mode()
    def admit(self, names: Iterable[str]) -> None:
        """Let those compete whose numbers are right."""
        for name in names:
            backend = get_backend(name)
            self._report(f"{self._phase}: checking {name}")
            self._attempt(backend, "a small batch", FIRST_CALL_S, functools.partial(self._admit, backend))

    def _admit(self, backend: type[AttentionBackend]) -> None:
        if is_interpreted(backend, self._device):
            self._exclude(backend, "its kernels are interpreted here")
        elif not backend.accepts_stored_keys():
            self._exclude(backend, "its KV cache is none of the usual shape, in which all are measured")
        elif wrong := wrong_numbers(backend, self._needs, self._phase, self._device):
            self._exclude(backend, wrong)
        else:
            self._backends.append(backend)

    @torch.inference_mode()
    def run(self, shape: Shape) -> list[Measurement]:
        """Time all on the same data, in turn, so that whatever else the machine does hits them alike.

        Raises:
            AttentionBackendError: the data does not fit the device's free memory.
        """
        if time.monotonic() >= self._deadline:
            self._report(f"{self._phase} {shape}: left out, the time is over")
            return []
        lens = [(shape.query_len, shape.context_len)] * shape.num_seqs
        try:
            batch = draw(self._needs, lens, self._device, caches_to_rotate(self._needs, shape, self._device))
        except torch.OutOfMemoryError as error:
            raise AttentionBackendError(f"{self._device} has too little free memory to measure {shape}") from error
        runs: dict[str, Run] = {}
        for backend in list(self._backends):
            self._attempt(
                backend, str(shape), _NEXT_SHAPE_S, functools.partial(self._enter, backend, batch, shape, runs)
            )
        best = min((run.one_call for run in runs.values()), default=0.0)
        for backend in list(self._backends):
            run = runs.get(backend.name)
            if run is not None and run.one_call > max(_HOPELESS * best, HOPELESS_S):
                self._exclude(backend, f"took {run.one_call:.2g} s at {shape}, where another took {best:.2g} s")
        names = {backend.name for backend in self._backends}
        runs = {name: run for name, run in runs.items() if name in names}
        seconds = _in_turn(runs)
        found = [Measurement(name, self._phase, shape, seconds[name]) for name in runs]
        figures = ", ".join(f"{m.backend} {m.seconds * 1e3:.3f}" for m in sorted(found, key=lambda m: m.seconds))
        self._report(f"{self._phase} {shape}, ms: {figures}")
        return found

    def _enter(self, backend: type[AttentionBackend], batch: Batch, shape: Shape, runs: dict[str, Run]) -> None:
        """Plan and warm up one backend; into `runs` with it unless it is far too slow."""
        run = Run(backend, self._needs, self._phase, batch, self._device)
        if run.one_call > TOO_SLOW_S:
            self._exclude(backend, f"took {run.one_call:.0f} s at {shape}")
        else:
            runs[backend.name] = run

    def _attempt(self, backend: type[AttentionBackend], where: str, limit_s: float, work: Callable[[], None]) -> None:
        """Exclude the backend if that takes too long or anything goes wrong: libraries may raise whatever they like."""
        began = time.monotonic()
        limit_s = min(limit_s, self._deadline - began)
        if limit_s <= 0:
            self._exclude(backend, "not tried: the time for measuring is over", out_of_time=True)
            return
        try:
            with time_limit(limit_s):
                work()
        except Exception as error:
            if isinstance(error, TimeLimitError) or time.monotonic() - began >= limit_s:  # some wrap what ended them
                self._exclude(backend, f"not ready after {limit_s:.3g} s at {where}", out_of_time=True)
                return
            self._exclude(backend, f"failed at {where}: {in_a_line(error)}")

    def _exclude(self, backend: type[AttentionBackend], reason: str, out_of_time: bool = False) -> None:
        self._backends = [other for other in self._backends if other is not backend]
        self.excluded.append(Excluded(backend.name, self._phase, reason, out_of_time))
        self._report(f"{self._phase}: {backend.name} is out: {reason}")


def _in_turn(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median seconds of a layer by backend. Who is far behind is not waited for more often than needed."""
    best = min((run.one_call for run in runs.values()), default=0.0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.perf_counter(), 0
    while runs and (rounds < _MIN_REPEATS or (rounds < _MAX_REPEATS and time.perf_counter() - began < ENOUGH_S)):
        for name, run in runs.items():
            if rounds == 0 or run.one_call < _FAR_BEHIND * best:
                times[name].append(run.seconds())
        rounds += 1
    return {name: run.per_layer(statistics.median(times[name])) for name, run in runs.items()}
