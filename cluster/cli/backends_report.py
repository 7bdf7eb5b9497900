"""What `baton backends` prints: the choice for each phase, and a row for every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attention.capability import Evidence
from attention.platform import Platform
from attention.spec import FP8, AttentionSpec, Phase

_EVIDENCE = {Evidence.RAN: "ran", Evidence.ADAPTER: "never ran", None: "-"}


@dataclass(frozen=True)
class Question:
    """What is to run where.

    Attributes:
        platform: the hardware.
        name: of the model.
        layers: every kind of layer that it has.
        dtype: of its activations.
        block_size: tokens in a KV block.
    """

    platform: Platform
    name: str
    layers: Sequence[AttentionSpec]
    dtype: torch.dtype
    block_size: int


@dataclass(frozen=True)
class Choice:
    """The outcome for one phase.

    Attributes:
        backends: by name, one for each kind of layer, each once; empty: there is none.
        because: how they were chosen, or why there is none.
    """

    backends: tuple[str, ...]
    because: str

    def __str__(self) -> str:
        return "; ".join(self.backends) or "none"


@dataclass(frozen=True)
class Row:
    """One backend: how it is known to run on the platform (None: it does not), and what is against it in each phase."""

    name: str
    evidence: Evidence | None
    unsupported_reasons: Mapping[Phase, Sequence[str]]


@dataclass(frozen=True)
class Report:
    """The whole answer.

    Attributes:
        question: what was asked.
        choices: for each phase.
        rows: one for every backend.
        broken: kernel libraries that are installed and cannot be used: name to reason.
    """

    question: Question
    choices: Mapping[Phase, Choice]
    rows: Sequence[Row]
    broken: Mapping[str, str] = field(default_factory=dict)


def print_report(report: Report, *, explain: bool) -> None:
    """Print a table; `explain` gives every reason against a backend, not only the first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(_header(report.question), markup=False, highlight=False)
    for phase, choice in report.choices.items():
        chosen = f"[bold {'green' if choice.backends else 'red'}]{choice}[/]"
        console.print(f"{phase:<8}{chosen} ({escape(choice.because)})", highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for column in ("backend", "prefill", "decode", "evidence"):
        table.add_column(column, no_wrap=True)
    table.add_column("why not", overflow="fold")
    for row in report.rows:
        cells = [_cell(row, phase, choice) for phase, choice in report.choices.items()]
        table.add_row(row.name, *cells, _EVIDENCE[row.evidence], escape("\n".join(_why_not(row, explain))))
    console.print(table)
    for name, reason in report.broken.items():
        console.print(f"[bold red]broken[/]  {escape(name)}: {escape(reason)}", highlight=False)


def as_json(report: Report) -> dict[str, Any]:
    """The answer as plain JSON values."""
    question = report.question
    first = question.layers[0]
    return {
        "platform": {
            "name": str(question.platform),
            "kind": question.platform.kind,
            "simulated": question.platform.simulated,
        },
        "model": {
            "name": question.name,
            "num_heads": first.num_heads,
            "num_kv_heads": first.num_kv_heads,
            "head_size": first.head_size,
            "sliding_windows": [layer.sliding_window for layer in question.layers],
            "dtype": _short(question.dtype),
            "kv_cache_dtype": _short(first.kv_cache_dtype or question.dtype),
            "block_size": question.block_size,
        },
        "chosen": {
            phase: {"backend": str(c) if c.backends else None, "because": c.because}
            for phase, c in report.choices.items()
        },
        "backends": [
            {
                "name": row.name,
                "evidence": row.evidence,
                "refusals": {phase: list(reasons) for phase, reasons in row.unsupported_reasons.items()},
            }
            for row in report.rows
        ],
        "broken": dict(report.broken),
    }


def _header(question: Question) -> str:
    first = question.layers[0]
    windows = [str(layer.sliding_window) for layer in question.layers if layer.sliding_window is not None]
    parts = [
        f"{first.num_heads} query and {first.num_kv_heads} KV heads of {first.head_size}",
        _short(question.dtype),
        f"blocks of {question.block_size}",
    ]
    parts += ["FP8 KV cache"] if first.kv_cache_dtype == FP8 else []
    parts += [f"window of {' and '.join(windows)} tokens"] if windows else []
    simulated = ", simulated" if question.platform.simulated else ""
    return f"{question.platform}{simulated}\n{question.name}: {', '.join(parts)}"


def _cell(row: Row, phase: Phase, choice: Choice) -> str:
    if row.name in choice.backends:
        return "[bold green]chosen[/]"
    return "[red]no[/]" if row.unsupported_reasons[phase] else "yes"


def _why_not(row: Row, explain: bool) -> list[str]:
    """The reasons, each once, with the phase where it is not both's."""
    everywhere = [r for r in row.unsupported_reasons[Phase.PREFILL] if r in row.unsupported_reasons[Phase.DECODE]]
    lines = list(everywhere)
    for phase, reasons in row.unsupported_reasons.items():
        lines += [f"{phase}: {reason}" for reason in reasons if reason not in everywhere]
    if explain or len(lines) < 2:
        return lines
    return [f"{lines[0]} (+{len(lines) - 1})"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
