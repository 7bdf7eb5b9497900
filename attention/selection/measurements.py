"""Measured speeds of backends, kept in a file: whose they are, whether they still hold, and who is fastest."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attention.platform import DeviceKind, Platform
from attention.selection.priority import candidates
from attention.spec import AttentionNeeds, Phase

FILE_NAME = "attention.json"
"""What the file is called in whatever folder caches are kept."""
_FORMAT = 1


@dataclass(frozen=True)
class Shape:
    """A batch of equal sequences.

    Attributes:
        num_seqs: B.
        query_len: tokens that each brings.
        context_len: tokens that each has with them.
    """

    num_seqs: int
    query_len: int
    context_len: int

    def __str__(self) -> str:
        prefix = self.context_len - self.query_len
        if prefix == 0:
            return f"{self.num_seqs} × {self.query_len}"
        return f"{self.num_seqs} × {self.context_len if self.query_len == 1 else f'({prefix} + {self.query_len})'}"


@dataclass(frozen=True)
class Measurement:
    """How long one layer takes.

    Attributes:
        backend: its name.
        phase: of the batch.
        shape: of the batch.
        seconds: median of one call, with the layer's share of planning the batch.
    """

    backend: str
    phase: Phase
    shape: Shape
    seconds: float


@dataclass(frozen=True)
class Excluded:
    """A backend that does not refuse and is out all the same: it failed, gave wrong numbers, or takes too long.

    Attributes:
        backend: its name.
        phase: of the batch.
        reason: in words.
        out_of_time: whether it was not measured to the end, so that nobody knows how fast it is.
    """

    backend: str
    phase: Phase
    reason: str
    out_of_time: bool = False


@dataclass(frozen=True)
class Conditions:
    """What measurements depend on. They hold as long as none of it changes.

    Attributes:
        device: its name.
        layer: heads, head size, dtypes, block size and the other properties of the layer.
        versions: of PyTorch and of the kernel libraries.
    """

    device: str
    layer: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, platform: Platform, needs: AttentionNeeds) -> Conditions:
        """The conditions here and now. The phase and what batches bring is not part of them."""
        spec = needs.spec
        layer = {
            **{name: value for name, value in asdict(spec).items() if name != "scale"},
            "alibi_slopes": spec.alibi_slopes is not None,
            "kv_cache_dtype": str(spec.kv_cache_dtype or needs.dtype),
            "dtype": str(needs.dtype),
            "block_size": needs.block_size,
        }
        return cls(_device_name(platform), layer, {"torch": torch.__version__, **platform.packages})

    def same_subject(self, other: Conditions) -> bool:
        """Whether both are about the same layer on the same device, of whatever versions."""
        return self.device == other.device and self.layer == other.layer


@dataclass(frozen=True)
class Record:
    """All measurements of one kind of layer.

    Attributes:
        conditions: under which they were made.
        measurements: of both phases.
        excluded: backends that could not be ranked, with the reason.
    """

    conditions: Conditions
    measurements: tuple[Measurement, ...]
    excluded: tuple[Excluded, ...] = ()


def ranking(measurements: Sequence[Measurement], phase: Phase | None = None) -> tuple[str, ...]:
    """Backends, fastest first: by the geometric mean, over all shapes, of their time over the best time.

    Args:
        measurements: of one kind of layer.
        phase: counts batches of this phase only; None counts all.

    Returns:
        Those that were measured on every shape.
    """
    return _fastest_first(_times(measurements, phase))


def load_ranking(path: Path, platform: Platform, needs: AttentionNeeds | Sequence[AttentionNeeds]) -> tuple[str, ...]:
    """Backends as measured on this platform, fastest first, for `select_backend`'s `fastest`.

    Args:
        path: the file that `save_record` wrote.
        platform: where the model runs.
        needs: of every kind of layer that the model has, all of one phase.

    Returns:
        Empty where the file or a kind of layer is missing, something has changed since it was measured, or there was no
        time for a backend that is preferred to the fastest one: which of them is faster is not known then.
    """
    kinds = [needs] if isinstance(needs, AttentionNeeds) else list(needs)
    records = load_records(path)
    times: dict[Hashable, Mapping[str, float]] = {}
    unknown: set[str] = set()
    for i, kind in enumerate(kinds):
        conditions = Conditions.of(platform, kind)
        record = next((record for record in records if record.conditions == conditions), None)
        if record is None:
            return ()
        times.update({(i, shape): seconds for shape, seconds in _times(record.measurements, kind.phase).items()})
        unknown.update(out.backend for out in record.excluded if out.phase is kind.phase and out.out_of_time)
    fastest = _fastest_first(times)
    preferred = itertools.takewhile(lambda name: name not in fastest[:1], candidates(platform, kinds[0]))
    return () if unknown.intersection(preferred) else fastest


def load_records(path: Path) -> list[Record]:
    """Everything in the file; nothing where there is none, or one that no version of this module wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return []
        return [_from_json(record) for record in content["records"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def save_record(path: Path, record: Record) -> None:
    """Put a record in the file, in the place of an older one about the same layer on the same device.

    Raises:
        OSError: the file cannot be written.
    """
    others = [kept for kept in load_records(path) if not kept.conditions.same_subject(record.conditions)]
    content = {"format": _FORMAT, "records": [asdict(kept) for kept in (*others, record)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    os.replace(file.name, path)


def _times(measurements: Sequence[Measurement], phase: Phase | None) -> dict[Hashable, Mapping[str, float]]:
    """Seconds by backend, for every shape."""
    times: dict[Hashable, dict[str, float]] = {}
    for measured in measurements:
        if phase in (None, measured.phase):
            times.setdefault((measured.phase, measured.shape), {})[measured.backend] = measured.seconds
    return dict(times)


def _fastest_first(times: Mapping[Hashable, Mapping[str, float]]) -> tuple[str, ...]:
    if not times:
        return ()
    complete = set.intersection(*(set(seconds) for seconds in times.values()))
    slowness = {
        name: sum(math.log(seconds[name] / min(seconds.values())) for seconds in times.values()) for name in complete
    }
    return tuple(sorted(complete, key=lambda name: (slowness[name], name)))


def _from_json(record: Mapping[str, Any]) -> Record:
    return Record(
        Conditions(**record["conditions"]),
        tuple(
            Measurement(m["backend"], Phase(m["phase"]), Shape(**m["shape"]), float(m["seconds"]))
            for m in record["measurements"]
        ),
        tuple(
            Excluded(e["backend"], Phase(e["phase"]), e["reason"], bool(e.get("out_of_time", False)))
            for e in record["excluded"]
        ),
    )


def _device_name(platform: Platform) -> str:
    """The platform's name; of a CPU the model, where Linux tells it."""
    if platform.kind is not DeviceKind.CPU:
        return str(platform)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return str(platform)
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), str(platform))
