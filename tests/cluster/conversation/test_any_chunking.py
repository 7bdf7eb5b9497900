"""However an answer is cut into pieces, it is the same message; nothing of it is lost and nothing raises."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answers import CALLS, TWO_CALLS, parser_of, read, without_ids
from cluster.conversation.registry import REASONING_FORMATS, TOOL_FORMATS

MARKERS = {entry.name: entry.markers for entry in TOOL_FORMATS}
THOUGHT = [mark for entry in REASONING_FORMATS if entry.name != "harmony" for mark in (entry.begin, entry.end)]
PIECES = [
    '{"name": "clock", ', '"arguments": ', '"parameters": ', '{"city": "', '"}', "}", "{", "[", "]", ", ", ": ", '"',
    "\\", "\\u00e9", "\n", " ", "```json\n", "```", "clock", "function", ">", "; ", "assistant", "analysis",
    "commentary", " to=functions.clock ", "json", "final", "-1.5e3", "true", "nul", "{}", "<", "<tool", "[TOOL", "é",
]  # fmt: skip
FORMATS = sorted(MARKERS)


def cut(text: str, ends: list[int]) -> list[str]:
    borders = [0, *sorted(end % (len(text) + 1) for end in ends), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str]:
    """A format, and an answer of its markers, the parts of calls and words, in any order or nearly right."""
    name = draw(st.sampled_from(FORMATS))
    words = iter(f"w{n}." for n in range(1000))
    part = st.one_of(
        st.sampled_from([mark for mark in MARKERS[name] if mark != "[CALL_ID]"]),
        st.sampled_from(PIECES),
        st.sampled_from(THOUGHT),
        st.just(TWO_CALLS[name].replace("[CALL_ID]abcdefghi", "")),
        st.builds(lambda: f"{next(words)}"),
        st.builds(lambda: f'{{"city": "{next(words)}"}}'),
    )
    return name, "".join(draw(st.lists(part, max_size=14)))


@given(answers(), st.lists(st.integers(0, 10_000), max_size=12))
@settings(max_examples=120, deadline=None)
def test_any_chunking_gives_the_same_message_and_loses_nothing(answer: tuple[str, str], ends: list[int]) -> None:
    name, text = answer
    whole = without_ids(read(parser_of(name), [text]))
    assert without_ids(read(parser_of(name), cut(text, ends))) == whole
    assert without_ids(read(parser_of(name), text)) == whole
    content, reasoning, calls = whole
    found = content + reasoning + "".join(call + arguments for call, arguments in calls)
    assert [word for word in re.findall(r"w\d+\.", text) if word not in found] == []


@given(st.sampled_from(FORMATS), st.data())
@settings(max_examples=60, deadline=None)
def test_an_answer_that_is_cut_off_anywhere_is_read(name: str, data: st.DataObject) -> None:
    text = TWO_CALLS[name]
    end = data.draw(st.integers(0, len(text)))
    parser = parser_of(name)
    _, _, calls = without_ids(read(parser, [text[:end]]))
    whole = [(call, arguments) for call, arguments in calls if _is_object(arguments)]
    assert [call for call, _ in whole] == [call for call, _ in CALLS[: len(whole)]]
    assert parser.calls_tools == (0 < len(calls) == len(whole))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


MARKED = [name for name in FORMATS if name != "llama3_json"]


@pytest.mark.parametrize("name", MARKED)
def test_markers_that_are_special_tokens_mean_nothing_when_they_are_spelt(name: str) -> None:
    parser = parser_of(name, special_tokens=MARKERS[name])
    assert without_ids(read(parser, TWO_CALLS[name])) == (TWO_CALLS[name], "", [])


@pytest.mark.parametrize("name", MARKED)
def test_markers_that_come_as_special_tokens_are_read(name: str) -> None:
    marker = re.compile("(" + "|".join(map(re.escape, MARKERS[name])) + ")")
    parser = parser_of(name, special_tokens=MARKERS[name])
    deltas = []
    for part in marker.split(TWO_CALLS[name]):
        deltas += parser.push_token(part) if part in MARKERS[name] else parser.push(part)
    assert parser.calls_tools
    assert [delta.name for delta in deltas if hasattr(delta, "name")] == ["get_weather", "clock"]
