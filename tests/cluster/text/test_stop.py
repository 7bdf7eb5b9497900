"""Stop strings against a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.stop import StopStrings


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The reference: where the first complete match ends, and there the longest match."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def feed(stops: list[str], parts: list[str]) -> tuple[list[str], bool]:
    """What comes out for each part and, unless it stopped, at the end."""
    found, out = False, []
    matcher = StopStrings(stops)
    for part in parts:
        piece, found = matcher.push(part)
        out.append(piece)
    return [*out, matcher.finish()], found


# Few letters, so that matches, overlaps and repeated beginnings are common.
letters = st.text(alphabet="ab😀", max_size=6)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(letters, max_size=10), stops=st.lists(letters.filter(bool), max_size=4))
def test_equals_a_search_in_the_whole_text(parts: list[str], stops: list[str]) -> None:
    out, found = feed(stops, parts)
    assert ("".join(out), found) == cut_at_stop("".join(parts), stops)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab", max_size=30), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5)))
def test_holds_back_exactly_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher, shown = StopStrings(stops), ""
    for i, char in enumerate(text, start=1):
        piece, found = matcher.push(char)
        shown += piece
        if found:
            break
        held = max((n for stop in stops for n in range(len(stop)) if text[:i].endswith(stop[:n])), default=0)
        assert shown == text[: i - held]


@pytest.mark.parametrize(
    ("stops", "parts", "shown", "found"),
    [
        (["END"], ["abc E", "N", "D x"], ["abc ", "", "", ""], True),
        (["END"], ["abc E", "N", "x END"], ["abc ", "", "ENx ", ""], True),
        (["END"], ["the END"], ["the ", ""], True),
        (["END"], ["the EN"], ["the ", "EN"], False),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], True),
        (["aab"], ["aaa", "b"], ["a", "", ""], True),
        (["abc", "b"], ["ab", "c"], ["a", "", ""], True),
        (["abc", "bc"], ["ab", "c"], ["", "", ""], True),
        (["bc", "abc"], ["xabc"], ["x", ""], True),
        (["👨‍👩‍👧"], ["a 👨", "\u200d👩", "\u200d👧!"], ["a ", "", "", ""], True),
        (["終わり"], ["終", "了"], ["", "終了", ""], False),
        ([], ["a", "b"], ["a", "b", ""], False),
    ],
)
def test_examples(stops: list[str], parts: list[str], shown: list[str], found: bool) -> None:
    assert feed(stops, parts) == (shown, found)


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopStrings(["x"])
    assert matcher.push("ax") == ("a", True)
    assert matcher.push("b") == ("", True)
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_the_match_can_be_part_of_the_text_and_is_named() -> None:
    for include, shown in ((False, "one "), (True, "one END")):
        matcher = StopStrings(["xyz", "END"], include=include)
        out = [matcher.push(part)[0] for part in ("one E", "ND two")]
        assert "".join(out) == shown
        assert matcher.found == "END"
