"""JSON read as it comes against Python's own parser."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.conversation.json_reader import MAX_DEPTH, JsonReader, Reading, is_json

TEXTS = st.text(alphabet='ab"\\\n\x00/é😀', max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NEARLY = st.text(alphabet='{}[]":,\\ntrue-0.5eu\n x', max_size=12)


def _loads(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: pytest.fail(name))
    except ValueError:
        return False
    return text == text.strip()


@given(VALUES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_value_is_json_and_whole_only_at_its_end(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert is_json(text)
    if isinstance(value, dict | list | str):
        reader = JsonReader()
        assert [reader.push(char) for char in text] == [1] * len(text)
        assert reader.state is Reading.DONE
        assert not is_json(text[:-1])


@given(NEARLY)
@settings(max_examples=150, deadline=None)
def test_what_is_nearly_json_is_told_from_json(text: str) -> None:
    assert is_json(text) == _loads(text)


@given(VALUES, st.data())
@settings(max_examples=40, deadline=None)
def test_it_stops_behind_the_value_and_at_what_breaks_it(value: object, data: st.DataObject) -> None:
    text = json.dumps({"a": value})
    reader = JsonReader()
    assert reader.push(text + "} more") == len(text)
    assert reader.state is Reading.DONE
    at = data.draw(st.integers(0, len(text) - 1))
    broken = JsonReader()
    end = broken.push(text[:at] + "\x00" + text[at:])
    assert (end, broken.state) == (at, Reading.BROKEN)


def test_bounds() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert not is_json("1" * 1000)
    assert not is_json("NaN")
