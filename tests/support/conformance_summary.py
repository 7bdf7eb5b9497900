"""The conformance suite's summary: what ran, passed, failed, was refused or left out, by backend, as one JSON file."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

PROPERTY = "conformance"
"""The name under which a test reports its backend and the reasons of each refusal, or None where it ran a case."""


def note(request: pytest.FixtureRequest, backend: str, refusals: list[list[str]] | None = None) -> None:
    """Say in a test which backend it holds against the reference, or why that refused each of the test's cases."""
    request.node.user_properties.append((PROPERTY, [backend, refusals]))


class ConformanceSummary:
    """Collects the reports of all tests, those of other processes too, and writes the file when the session ends.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failures: defaultdict[str, list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once it has run."""
        noted: Any = dict(report.user_properties).get(PROPERTY)
        if report.when != "call" or noted is None:
            return
        backend, refusals = noted
        if report.failed:
            self.failures[backend].append(report.nodeid.rpartition("::")[2])
        if refusals is not None and not report.failed:
            self.counts[backend]["refused"] += len(refusals)
            for reasons in refusals:
                self.reasons[backend].update(reasons)
        else:
            self.counts[backend]["run"] += 1
            self.counts[backend]["failed" if report.failed else "passed"] += 1

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """What the file says."""
        from attention_limits import LIMITS, left_out

        device = "cuda" if torch.cuda.is_available() else "cpu"
        backends = {}
        for name in sorted(self.counts):
            counts = {key: self.counts[name][key] for key in ("run", "passed", "failed", "refused")}
            row: dict[str, Any] = {**counts, "left_out": left_out(name, device)}
            if limit := LIMITS.get((name, device)):
                row["left_out_because"] = limit.why
            row["refused_because"] = dict(self.reasons[name].most_common())
            row["failures"] = sorted(self.failures[name])
            backends[name] = row
        keys = ("run", "passed", "failed", "refused", "left_out")
        totals = {key: sum(backend[key] for backend in backends.values()) for key in keys}
        return {"environment": _environment(), "totals": totals, "backends": backends}


def _environment() -> dict[str, str | None]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "flashinfer-python", "xformers", "flash-attn")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
