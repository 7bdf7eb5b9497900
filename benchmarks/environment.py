"""Where and with what a result was measured: part of every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "transformers",
    "ray",
    "nixl",
    "nixl-cu13",
    "grpcio",
    "llguidance",
    "xgrammar",
)


@dataclass(frozen=True)
class Environment:
    """What has an influence on a measurement.

    Attributes:
        date: when it was taken, ISO 8601 with the time zone.
        commit: of the checkout, or "unknown" outside one.
        dirty: whether the checkout had changes that the commit does not have.
        python: version of the interpreter.
        packages: version by distribution; None where one is not installed.
        cpu: the processor's name.
        cores: that this process may use.
        load_average: of the machine over the last minute, at the start; near 0 when it was quiet.
        threads: for the arithmetic, of the process or worker that computes; None where it is the server's own affair.
        command: what was typed.
    """

    date: str
    commit: str
    dirty: bool
    python: str
    packages: dict[str, str | None]
    cpu: str
    cores: int
    load_average: float
    threads: int | None
    command: str

    @classmethod
    def capture(cls, threads: int | None, argv: Sequence[str] | None = None) -> Environment:
        """This machine, now. `argv` is the command; None takes the process's own."""
        return cls(
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            commit=_git("rev-parse", "HEAD") or "unknown",
            dirty=bool(_git("status", "--porcelain", "--untracked-files=normal", "--", ".", ":!benchmarks/results")),
            python=platform.python_version(),
            packages={name: _version(name) for name in _PACKAGES},
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)),
            load_average=round(os.getloadavg()[0], 2),
            threads=threads,
            command=shlex.join(_without_secrets(_command() if argv is None else argv)),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def gpu_names() -> list[str]:
    """The machine's NVIDIA GPUs as their driver names them; empty where there is none."""
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]


def _command() -> list[str]:
    """This process's command line as one would type it, without the value of a secret flag."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else [Path(sys.argv[0]).name]
    return [*program, *sys.argv[1:]]


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """`argv` with the value of `--token`, which may be abbreviated, replaced."""
    kept: list[str] = []
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        secret = len(flag) > 4 and "--token".startswith(flag)
        if kept and len(kept[-1]) > 4 and "--token".startswith(kept[-1]):
            kept.append("…")
        else:
            kept.append(f"{flag}=…" if secret and equals else argument)
    return kept


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
