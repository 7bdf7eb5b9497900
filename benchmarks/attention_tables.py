"""The tables of docs/attention.md: what each backend can do, which is chosen where, and what was run and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attention.capability import DeviceSupport, Sizes
from attention.errors import AttentionBackendError
from attention.platform import PACKAGES, SIMULATED, DeviceKind, Platform
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import select_backend
from attention.spec import FP8, AttentionNeeds, AttentionSpec, Feature, MLASpec, Phase
from benchmarks.markdown import provenance, read_result, table

_FAMILIES = {
    DeviceKind.CPU: "CPU",
    DeviceKind.CUDA: "CUDA",
    DeviceKind.ROCM: "ROCm",
    DeviceKind.TPU: "TPU",
    DeviceKind.XPU: "XPU",
}
_CONFORMANCE = "attention_conformance_*.json"
_BENCHMARK = "attention_*.json"


@dataclass(frozen=True)
class Situation:
    """A column of the table of choices.

    Attributes:
        title: of the column.
        spec: the layer.
        block_size: tokens in a KV block.
        features: what batches bring.
    """

    title: str
    spec: AttentionSpec
    block_size: int = 16
    features: frozenset[Feature] = frozenset()


_PLAIN = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)
_MLA = AttentionSpec(128, 1, 576, 192**-0.5, mla=MLASpec(512, 128, 64, 128))
SITUATIONS = (
    Situation("plain", _PLAIN),
    Situation("FP8 KV", replace(_PLAIN, kv_cache_dtype=FP8)),
    Situation("sinks", replace(_PLAIN, head_size=64, has_sinks=True)),
    Situation("ALiBi", replace(_PLAIN, alibi_slopes=(0.5,) * 32)),
    Situation("tree mask", _PLAIN, features=frozenset({Feature.TREE_MASK})),
    Situation("MLA", _MLA, block_size=64),
    Situation("MLA, blocks of 128", _MLA, block_size=128),
)


def backends(_: Path) -> str:
    """Every backend: hardware with libraries and evidence, dtypes, sizes."""
    rows = []
    for name in BACKENDS:
        can = get_backend(name).capabilities
        rows.append(
            (
                f"`{name}`",
                "<br>".join(map(_device, can.devices)),
                ", ".join(str(dtype).removeprefix("torch.") for dtype in can.dtypes),
                _sizes(can.head_sizes),
                _sizes(can.block_sizes),
                ", ".join(can.phases),
                ", ".join(kind.value.replace("_", "-") for kind in can.attention_types),
            )
        )
    header = ("backend", "runs on", "dtypes", "head sizes", "block sizes", "phases", "attention types")
    return table(header, rows, num_text_columns=len(header))


def features(_: Path) -> str:
    """Every backend and feature: a check mark, or the number of the reason in the list below."""
    reasons: dict[str, int] = {}
    rows = []
    for name in BACKENDS:
        can = get_backend(name).capabilities
        cells = []
        for feature in Feature:
            reason = can.refused.get(feature)
            if feature in can.features:
                cells.append("✓")
            elif reason is None:
                cells.append("—")
            else:
                cells.append(f"({reasons.setdefault(reason, len(reasons) + 1)})")
        rows.append((f"`{name}`", *cells))
    body = table(("backend", *Feature), rows, num_text_columns=1 + len(Feature))
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return f"{body}\n\n{notes}" if notes else body


def choices(_: Path) -> str:
    """What is chosen on every simulated platform, for prefill and for decode where they differ."""
    rows = []
    for key, platform in SIMULATED.items():
        dtype = torch.float16 if platform.lacks(torch.bfloat16) else torch.bfloat16
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append((f"`{key}`", str(platform), dtype_name, *(_chosen(platform, s, dtype) for s in SITUATIONS)))
    header = ("`--simulate`", "platform", "dtype", *(situation.title for situation in SITUATIONS))
    return table(header, rows, num_text_columns=len(header))


def conformance(results: Path) -> str:
    """What the conformance suite found, a table for each device that it ran on."""
    parts = []
    for path in sorted(results.glob(_CONFORMANCE)):
        result = read_result(path)
        rows = [(f"`{name}`", *_counts(counts)) for name, counts in result["backends"].items()]
        rows.append(("all", *_counts(result["totals"])))
        body = table(("backend", "run", "passed", "failed", "refused", "left out"), rows, num_text_columns=1)
        where = ", ".join(
            f"{name} {value}" for name, value in result["environment"].items() if value and name != "device"
        )
        parts.append(f"**{result['environment']['device']}** ({where}; `benchmarks/results/{path.name}`)\n\n{body}")
    return "\n\n".join(parts) or "No run is kept yet."


def benchmark(results: Path) -> str:
    """Backends side by side, a table for each device and phase; the chosen one's figure is bold."""
    parts = []
    for path in sorted(set(results.glob(_BENCHMARK)) - set(results.glob(_CONFORMANCE))):
        result = read_result(path)
        heads = "{} query and {} KV heads of {}".format(*result["config"]["heads"])
        parts.append(f"**{result['config']['device']}**, {result['config']['dtype']}, {heads}.")
        flops = ("TFLOP/s", 1e12) if result["matrix_flops_per_s"] > 1e12 else ("GFLOP/s", 1e9)
        for phase, (unit, size) in ((Phase.PREFILL, flops), (Phase.DECODE, ("GB/s", 1e9))):
            measured = [row for row in result["rows"] if row["phase"] == phase]
            if measured:
                parts.append(_side_by_side(measured, f"{phase}, {unit}", size))
        parts.append(provenance(result["environment"]))
    return "\n\n".join(parts) or "No result is kept yet."


TABLES: Mapping[str, Callable[[Path], str]] = {
    "backends": backends,
    "features": features,
    "choices": choices,
    "conformance": conformance,
    "benchmark": benchmark,
}
"""Name of a marker in the page to what makes its table from the folder of results."""


def _device(support: DeviceSupport) -> str:
    """Such as "CUDA SM 8.0+ with triton: ran on SM 9.0"."""
    libraries = [PACKAGES[package][1] for package in support.packages]
    libraries += [" or ".join(PACKAGES[package][1] for package in support.any_of)] if support.any_of else []
    name = _FAMILIES[support.kind] + str(support).removeprefix(support.kind)
    evidence = f"ran on {', '.join(support.ran_on)}" if support.ran_on else "never ran"
    return f"{name}{' with ' if libraries else ''}{', '.join(libraries)}: {evidence}"


def _sizes(sizes: Sizes) -> str:
    """As `Sizes` says it; a long list by its ends."""
    if len(sizes.only) > 6:
        return f"{sizes.only[0]}, {sizes.only[1]}, {sizes.only[2]}, … {sizes.only[-1]}"
    return str(sizes)


def _chosen(platform: Platform, situation: Situation, dtype: torch.dtype) -> str:
    names = []
    for phase in Phase:
        prefix = frozenset({Feature.PREFIX}) if phase is Phase.PREFILL else frozenset[Feature]()
        needs = AttentionNeeds(situation.spec, dtype, situation.block_size, phase, situation.features | prefix)
        try:
            names.append(select_backend(platform, needs).backend.name)
        except AttentionBackendError:
            names.append("none")
    return names[0] if names[0] == names[1] else " / ".join(names)


def _counts(counts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{counts[key]:,}" for key in ("run", "passed", "failed", "refused", "left_out"))


def _side_by_side(measured: list[Mapping[str, Any]], title: str, unit: float) -> str:
    """A row for each case, a column for each backend, rates in `unit`s a second."""
    names = list(dict.fromkeys(row["backend"] for row in measured))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in measured:
        cells.setdefault((row["name"], str(row["block_size"])), {})[row["backend"]] = _figure(row, unit)
    rows = [(*case, *(figures.get(name, "—") for name in names)) for case, figures in cells.items()]
    return table((title, "block", *(f"`{name}`" for name in names)), rows, num_text_columns=1)


def _figure(row: Mapping[str, Any], unit: float) -> str:
    if "error" in row:
        return "failed"
    rate, share = (
        (row["bytes_per_s"], row["of_copy_bandwidth"])
        if "bytes_per_s" in row
        else (row["flops_per_s"], row["of_matrix_rate"])
    )
    rate /= unit
    text = f"{rate:.{1 if rate < 10 else 0}f}"
    return f"**{text}** ({share:.0%})" if row["chosen"] else f"{text} ({share:.0%})"
