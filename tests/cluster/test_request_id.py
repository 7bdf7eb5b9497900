"""No client writes lines of its own into a log."""

from __future__ import annotations

import pytest

from cluster.request_id import MAX_LENGTH, clean_request_id


@pytest.mark.parametrize("name", ["", "r-17", "ordre n° 5", "依頼", "a b"])
def test_a_name_of_one_line_stays_as_it_is(name):
    assert clean_request_id(name) == name


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("a\nERROR all is lost", r"a\nERROR all is lost"),
        ("a\r\x1b[2Jb", r"a\r\x1b[2Jb"),
        ("a\u2028b\u202ec", r"a\u2028b\u202ec"),
        ("a\x85b", r"a\x85b"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_not_printable_is_escaped(given, cleaned):
    assert clean_request_id(given) == cleaned


def test_a_long_name_is_cut_escaped_or_not():
    assert clean_request_id("x" * 500) == "x" * MAX_LENGTH
    assert len(clean_request_id("\n" * 500)) == MAX_LENGTH
