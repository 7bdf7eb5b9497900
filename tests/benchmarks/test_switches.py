"""The table of promises and the mechanisms that can be switched off belong together, and fit the code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.switch import Switch
from benchmarks.switched_off import fails_without, out_of_date, switched_off
from benchmarks.switches import SWITCHES

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"


def test_each_mechanism_and_its_test_are_where_they_are_said_to_be():
    assert out_of_date() == []
    moved = replace(SWITCHES[0], on="nobody writes this")
    untested = replace(SWITCHES[1], test=SWITCHES[1].test + "_no_more")
    assert out_of_date([moved, untested, SWITCHES[2]]) == [moved.name, untested.name]
    with pytest.raises(ValueError, match="has its text 0 times"):
        switched_off(moved, "")


def test_each_promise_names_its_mechanisms_and_a_test_of_theirs():
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", PAGE.read_text(), re.M)]
    rows = [row for row in cells if len(row) == 4 and row[0] not in ("promise", "---")]
    tests = {name: row[3] for row in rows for name in row[2].split(", ")}
    assert sorted(tests) == sorted(switch.name for switch in SWITCHES)
    for switch in SWITCHES:
        assert switch.test.partition("::")[0] in tests[switch.name]


def test_a_test_that_notices_is_told_from_one_that_does_not(tmp_path):
    (tmp_path / "mechanism.py").write_text("def works():\n    return True\n")
    (tmp_path / "test_it.py").write_text(
        "from mechanism import works\n\ndef test_it():\n    assert works()\n\ndef test_nothing():\n    pass\n"
    )
    switch = Switch("it", "mechanism.py", "return True", "return False", "test_it.py::test_it")
    assert fails_without(switch, tmp_path)
    assert not fails_without(replace(switch, test="test_it.py::test_nothing"), tmp_path)
    (tmp_path / "mechanism.py").write_text("def works():\n    return False  # or return True\n")
    assert not fails_without(switch, tmp_path), "it fails as it is"
    assert "return True" in (tmp_path / "mechanism.py").read_text()
