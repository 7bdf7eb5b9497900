"""The limits that docs/limits.md names are those of the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "limits.md"
ROW = re.compile(r"^\| (?P<what>.+?) \| (?P<limit>[\d.]+) \| `(?P<name>[\w.]+)` \|$", re.MULTILINE)
ROWS = [match.group("name", "limit") for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]


def test_every_row_is_read() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(ROWS) == sum(not line.startswith(("| ---", "| what")) for line in rows)
    assert len(ROWS) > 20


@pytest.mark.parametrize(("name", "limit"), ROWS)
def test_a_limit_is_as_the_page_says(name: str, limit: str) -> None:
    module, _, constant = name.rpartition(".")
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, cls = module.rpartition(".")
        holder = getattr(importlib.import_module(module), cls)
    assert getattr(holder, constant) == float(limit)
