"""Kernels in Gluon compile with the Triton that is installed, which no GPU is needed for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_every_gluon_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        pytest.skip(f"Triton {triton.__version__} has none of these kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "gluon_kernels.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    files = (path.read_text() for folder in ("attention", "workers") for path in (ROOT / folder).rglob("*.py"))
    written = {name for text in files if "import gluon\n" in text for name in re.findall(r"def (\w+_kernel)\(", text)}
    assert set(result.stdout.split()) == written
