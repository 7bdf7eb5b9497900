"""The modules that the pages name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("attention", "benchmarks", "cluster", "deploy", "kv_transfer", "protos", "tests", "workers")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMED = re.compile(r"[\w/]+\.py\b")


@pytest.fixture(scope="module")
def files() -> list[str]:
    return [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path, files: list[str]) -> None:
    named = sorted(set(NAMED.findall(page.read_text(encoding="utf-8"))))
    assert [name for name in named if not any(path.endswith(f"/{name.lstrip('/')}") for path in files)] == []
