"""What models of each family write, and what it says."""

import json

import pytest

from answers import CALLS, CLOCK, TWO_CALLS, USE, WEATHER, parser_of, read, read_deltas, without_ids
from cluster.conversation.answer import AnswerParser
from cluster.conversation.deltas import ArgumentsDelta, ContentDelta, ToolCallStarted
from cluster.conversation.messages import ToolChoice, ToolChoiceMode, ToolUse
from cluster.conversation.registry import choose_formats

FORMATS = sorted(TWO_CALLS)
THINKING = {
    "hermes": "<think>\nHm. {text}\n</think>\n\n",
    "mistral_v11": "[THINK]Hm. {text}[/THINK]",
    "harmony": "<|channel|>analysis<|message|>Hm. {text}<|end|><|start|>assistant",
}


@pytest.mark.parametrize("name", FORMATS)
def test_two_calls_behind_a_word(name: str) -> None:
    parser = parser_of(name)
    message = read(parser, [TWO_CALLS[name]])
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == CALLS
    assert message.content == ("" if name == "llama3_json" else "I look.")
    assert parser.calls_tools
    ids = [call.id for call in message.tool_calls]
    assert len(set(ids)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids) == name.startswith("mistral")


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_stream(name: str) -> None:
    deltas = [delta for part in read_deltas(parser_of(name), TWO_CALLS[name]) for delta in part]
    city = [d.text for d in deltas if isinstance(d, ArgumentsDelta) and d.index == 0]
    assert len(city) > 10
    assert [d.index for d in deltas if isinstance(d, ToolCallStarted)] == [0, 1]
    assert deltas.index(next(d for d in deltas if isinstance(d, ToolCallStarted))) < len(deltas) // 2


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_only_where_several_are_not_wanted(name: str) -> None:
    parser = parser_of(name, ToolUse((WEATHER, CLOCK), parallel=False))
    message = read(parser, TWO_CALLS[name] + " more")
    assert [call.name for call in message.tool_calls] == ["get_weather"]
    assert json.loads(message.tool_calls[0].arguments) == CALLS[0][1]
    assert (parser.done, parser.calls_tools) == (True, True)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
@pytest.mark.parametrize("use", [None, ToolUse((WEATHER,), ToolChoice(ToolChoiceMode.NONE))])
def test_without_tools_everything_is_content(name: str, use: ToolUse | None) -> None:
    parser = parser_of(name, use)
    assert without_ids(read(parser, [TWO_CALLS[name]])) == (TWO_CALLS[name], "", [])
    assert not parser.calls_tools


@pytest.mark.parametrize("name", sorted(THINKING))
def test_reasoning_is_told_from_content_and_calls(name: str) -> None:
    thought = THINKING[name].format(text="<tool_call>{")
    content, reasoning, calls = without_ids(read(parser_of(name), [thought + TWO_CALLS[name]]))
    assert (content, reasoning) == ("I look.", "Hm. <tool_call>{")
    assert [call for call, _ in calls] == ["get_weather", "clock"]


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    answer = "Hm.\n</think>\n\nHello"
    assert without_ids(read(parser_of("hermes", prompt="…<think>\n"), answer)) == ("Hello", "Hm.", [])
    assert without_ids(read(parser_of("hermes", prompt="…<think>\n\n</think>\n\n"), "Hello")) == ("Hello", "", [])
    assert without_ids(read(parser_of("hermes", prompt="…<think>\n"), "Hm. And")) == ("", "Hm. And", [])
    assert without_ids(read(parser_of("hermes"), answer)) == (answer, "", [])


def test_a_marker_in_the_reasoning_is_part_of_it() -> None:
    text = "<think>What does <think> mean?</think>It begins."
    assert without_ids(read(parser_of("hermes"), text)) == ("It begins.", "What does <think> mean?", [])


def test_reasoning_that_is_not_told_apart_stays_content() -> None:
    text = "<think>\nHm.\n</think>\n\nHello "
    plain = AnswerParser(choose_formats("none", "none", ""))
    assert without_ids(read(plain, text)) == (text, "", [])
    channels = AnswerParser(choose_formats("harmony", "none", ""))
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello"
    assert without_ids(read(channels, text)) == ("Hm.\nHello", "", [])


BROKEN = {
    "no JSON": ("hermes", "Hi <tool_call>\n{name: clock}\n</tool_call> there"),
    "no name": ("hermes", '<tool_call>{"arguments": {"city": "x"}}</tool_call>'),
    "arguments that are no object": ("hermes", '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>'),
    "a closing tag too early": ("hermes", '<tool_call>{"name": "clock"</tool_call>'),
    "cut off before the arguments": ("hermes", 'Hi\n<tool_call>\n{"name": "clock", "argum'),
    "nothing in it": ("hermes", "<tool_call></tool_call>"),
    "a function that is not known": ("llama3_json", '{"name": "Bob", "parameters": {"age": 3}}'),
    "an object that is no call": ("llama3_json", '{"name": "clock", "age": 3}'),
    "a call that is not at the beginning": ("llama3_json", 'It is {"name": "clock", "parameters": {}}'),
    "code": ("llama3_json", "<|python_tag|>print(1)"),
    "a list of something else": ("mistral", "[TOOL_CALLS][1, 2]"),
    "no arguments": ("mistral_v11", "[TOOL_CALLS]clock[ARGS]now"),
    "no fence": ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\nnow"),
    "an empty section": ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
    "text in a call": ("qwen3_coder", "<tool_call>\nclock\n</tool_call>"),
    "no name in a function": ("qwen3_coder", "<function=>"),
}


@pytest.mark.parametrize(("name", "text"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_call_is_content_as_it_was_written(name: str, text: str) -> None:
    parser = parser_of(name)
    assert without_ids(read(parser, text)) == (text, "", [])
    assert not parser.calls_tools


def test_a_call_that_breaks_off_keeps_what_came_and_is_not_whole() -> None:
    parser = parser_of("hermes")
    text = '<tool_call>{"name": "clock", "arguments": {"city": "Rome", "at": noon}}</tool_call>'
    content, _, calls = without_ids(read(parser, text))
    assert calls == [("clock", '{"city": "Rome", "at": n')]
    assert content == "oon}}</tool_call>"
    assert not parser.calls_tools


def test_calls_as_models_write_them_a_little_differently() -> None:
    def calls_of(name: str, text: str) -> list[tuple[str, str]]:
        return without_ids(read(parser_of(name), text))[2]

    inside = '{"city": "</tool_call> {\\"} "}'
    assert calls_of("hermes", f'<tool_call>{{"arguments": {inside}, "name": "clock"}}</tool_call>') == [
        ("clock", inside)
    ]
    text = '<tool_call>{"name": "clock", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>'
    assert calls_of("hermes", text) == [("clock", '{"city": "Rome"}')]
    assert calls_of("hermes", '<tool_call>{"name": "clock"}') == [("clock", "{}")]
    assert calls_of("mistral", '[TOOL_CALLS]{"name": "clock", "arguments": {}}') == [("clock", "{}")]
    assert calls_of("mistral_v11", "[TOOL_CALLS]clock{}") == [("clock", "{}")]
    assert calls_of("llama3_json", '<|python_tag|>{"name": "clock", "parameters": {}}') == [("clock", "{}")]


def test_values_of_elements_have_the_types_of_the_schema() -> None:
    text = (
        "<tool_call><function=get_weather><parameter=city>\n12\n\n</parameter><parameter=days>12</parameter>"
        '<parameter=fine>True</parameter><parameter=more>{"a": [1]}</parameter><parameter=other>a "b"</parameter>'
        "</function></tool_call>"
    )
    (call,) = read(parser_of("qwen3_coder"), text).tool_calls
    assert json.loads(call.arguments) == {
        "city": "12\n", "days": 12, "fine": True, "more": {"a": [1]}, "other": 'a "b"',
    }  # fmt: skip


def test_messages_of_an_answer_in_channels_are_paragraphs() -> None:
    text = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Last."
    )
    assert without_ids(read(parser_of("harmony"), text)) == ("First.\nLast.", "One.\nTwo.", [])
    builtin = "<|channel|>analysis to=python code<|message|>print(1)<|call|>"
    assert without_ids(read(parser_of("harmony"), builtin)) == ("", "print(1)", [])


def test_spaces_around_calls_are_no_content_and_others_are() -> None:
    parser = AnswerParser(choose_formats("hermes", "none", ""), USE)
    assert parser.push("Hello  ") == [ContentDelta("Hello")]
    assert parser.push("\nthere \n") == [ContentDelta("  \nthere")]
    assert parser.finish() == [ContentDelta(" \n")]
