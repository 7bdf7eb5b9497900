"""What `baton doctor` prints: tables for people, or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.cli.doctor.findings import CandidateReport, Finding
from cluster.cli.doctor.machine import Gpu, Machine

if TYPE_CHECKING:
    from rich.console import Console

    from kv_transfer.diagnostics.report import PathReport


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        machine: this one.
        variables: UCX's and NIXL's, as the processes had them.
        pairs: each path.
        findings: what is wrong.
    """

    machine: Machine
    variables: Mapping[str, str]
    pairs: Sequence[CandidateReport]
    findings: Sequence[Finding]

    @property
    def degraded(self) -> bool:
        """Whether handoffs suffer."""
        return any(finding.degraded for finding in self.findings)

    @property
    def versions(self) -> dict[str, str]:
        """Of everything on the path."""
        ucx = next((pair.path.ucx_version for pair in self.pairs if pair.path and pair.path.ucx_version), None)
        return {**self.machine.versions, **({"ucx": ucx} if ucx else {})}


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain JSON values."""
    return {
        "ok": not diagnosis.degraded,
        "versions": diagnosis.versions,
        "environment": dict(diagnosis.variables),
        "gpus": [asdict(gpu) for gpu in diagnosis.machine.gpus],
        "pairs": [
            {
                "name": pair.name,
                "transport": pair.transport,
                "evidence": pair.evidence,
                "link": asdict(pair.link),
                "path": asdict(pair.path) if pair.path is not None else None,
                "failure": pair.failure or None,
            }
            for pair in diagnosis.pairs
        ],
        "findings": [asdict(finding) for finding in diagnosis.findings],
    }


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print tables, then what is wrong."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print("  ".join(f"[dim]{name}[/] {version}" for name, version in diagnosis.versions.items()))
    for gpu in diagnosis.machine.gpus:
        console.print(_gpu_line(gpu), markup=False)
    for pair in diagnosis.pairs:
        console.print()
        _print_pair(console, pair)
    console.print()
    for finding in diagnosis.findings:
        style, word = ("bold red", "DEGRADED") if finding.degraded else ("yellow", "note")
        console.print(f"{word}: {finding.what}", style=style, markup=False)
        console.print(f"  mend: {finding.mend}", markup=False)
    if not diagnosis.degraded:
        console.print("all is well", style="bold green")


def _gpu_line(gpu: Gpu) -> str:
    facts = gpu.facts
    if not facts:
        return f"GPU {gpu.position} (nvidia-smi says nothing about it)"
    links = f"{gpu.nvlinks} NVLinks, {gpu.nvlink_bytes_per_s / 1e9:.0f} GB/s" if gpu.nvlinks else "no NVLink"
    return (
        f"GPU {gpu.position} {facts['name']}, {facts['memory.total']} MiB, {links}, "
        f"clocks {facts['clocks.sm']} of {facts['clocks.max.sm']} MHz, memory {facts['clocks.mem']} of "
        f"{facts['clocks.max.mem']} MHz"
    )


def _print_pair(console: Console, pair: CandidateReport) -> None:
    if pair.path is None:
        console.print(f"{pair.name}: failed", style="bold red", markup=False)
        return
    console.print(f"[bold]{pair.name}[/]: {pair.transport} [dim]({pair.evidence})[/]")
    measured = pair.path.measured
    console.print(
        f"first contact {measured.first_contact_s * 1e3:.1f} ms, then the first WRITE "
        f"{measured.first_write_s * 1e3:.2f} ms, message there and back "
        f"{measured.round_trip_s * 1e6:.0f} µs, posting a WRITE {measured.cost.write_s * 1e6:.0f} µs and "
        f"{measured.cost.descriptor_s * 1e6:.1f} µs per descriptor",
    )
    console.print(_rate_table(pair.path))
    console.print(_posting_table(pair.path))


def _rate_table(path: PathReport) -> Any:
    table = _table("transfer", "WRITE GB/s", "READ GB/s")
    rates = {(rate.operation, rate.num_bytes): rate.bytes_per_s for rate in path.measured.rates}
    for size in sorted({num_bytes for _, num_bytes in rates}):
        found = (rates.get((operation, size)) for operation in ("WRITE", "READ"))
        cells = ("-" if rate is None else f"{rate / 1e9:.2f}" for rate in found)
        table.add_row(f"{size / 1024:.0f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.0f} MiB", *cells)
    return table


def _posting_table(path: PathReport) -> Any:
    table = _table("blocks in a WRITE", "descriptors", "posted µs", "landed µs")
    for posting in path.measured.postings:
        where = "together" if posting.contiguous else "scattered"
        table.add_row(
            f"{posting.num_blocks} {where}",
            str(posting.num_descriptors),
            f"{posting.post_s * 1e6:.0f}",
            f"{posting.landed_s * 1e6:.0f}",
        )
    return table


def _table(first: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
