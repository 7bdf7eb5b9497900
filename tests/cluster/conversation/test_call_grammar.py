"""Grammars of answers that must call a function: what they allow is what the parser of the format reads."""

import json
import re

import llguidance
import pytest

from answers import CLOCK, TWO_CALLS, USE, WEATHER, parser_of, read
from cluster.conversation.call_grammar import call_grammar
from cluster.conversation.messages import Tool, ToolChoice, ToolChoiceMode, ToolUse
from cluster.conversation.reasoning_format import THINK
from cluster.conversation.registry import TOOL_FORMATS, choose_formats
from scripted_service import EOS, byte_vocabulary
from workers.grammars.vocabulary import vocabulary_of

BYTES = llguidance.LLTokenizer("byte")
BY_NAME = {entry.name: entry for entry in TOOL_FORMATS}


def allows(grammar: str, text: str) -> bool:
    """Whether the whole text is one of the grammar's."""
    matcher = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def calls_of(name: str) -> str:
    """The calls of `TWO_CALLS`, without the word before them; ids are not for the model to make."""
    text = re.sub(r', "id": "\w+"|\[CALL_ID\]\w+', "", TWO_CALLS[name].removeprefix("I look.").lstrip("\n"))
    if name != "harmony":
        return text
    start = text.index("<|channel|>commentary to=")
    return text[start : text.index("<|call|>")]


@pytest.mark.parametrize("name", sorted(TWO_CALLS))
def test_calls_as_models_write_them_are_allowed_and_other_answers_are_not(name: str) -> None:
    required = ToolUse((WEATHER, CLOCK), ToolChoice(ToolChoiceMode.REQUIRED))
    grammar, text = call_grammar(BY_NAME[name], required), calls_of(name)
    assert allows(grammar, text)
    assert parser_of(name, required)
    assert [call.name for call in read(parser_of(name), text).tool_calls][:1] == ["get_weather"]
    assert not allows(grammar, "It is fine in Rome.")
    assert not allows(grammar, text.replace("get_weather", "get_time"))
    assert not allows(grammar, text.replace("city", "town"))
    one = call_grammar(BY_NAME[name], ToolUse(required.tools, required.choice, parallel=False))
    assert allows(one, text) == (name == "harmony")


def test_a_named_function_alone_and_with_its_schema() -> None:
    grammar = call_grammar(BY_NAME["hermes"], ToolUse(USE.tools, ToolChoice(ToolChoiceMode.NAMED, "clock")))

    def call(name: str, arguments: dict) -> str:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'

    assert allows(grammar, call("clock", {"city": '::= / \\ " Rome'}))
    assert not allows(grammar, call("clock", {"city": 3}))
    assert not allows(grammar, call("get_weather", {"city": "Rome"}))


def test_reasoning_comes_before_the_calls_if_there_is_any() -> None:
    required = ToolUse((CLOCK,), ToolChoice(ToolChoiceMode.REQUIRED))
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    opened = call_grammar(BY_NAME["hermes"], required, THINK, opened=True)
    assert allows(opened, f"Hm </x> {call}\n</think>\n\n{call}")
    assert not allows(opened, call)
    free = call_grammar(BY_NAME["hermes"], required, THINK)
    assert allows(free, call)
    assert allows(free, f"<think>\nHm\n</think>\n\n{call}")
    assert not allows(free, f"Hm\n</think>\n\n{call}")
    channels = call_grammar(BY_NAME["harmony"], required, choose_formats("harmony", "auto", "").reasoning)
    assert allows(
        channels,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.clock "
        "<|constrain|>json<|message|>{}",
    )


def test_markers_that_are_special_tokens_are_allowed_as_tokens_and_not_as_text() -> None:
    channels = BY_NAME["harmony"]
    tokenizer = byte_vocabulary((*channels.markers, EOS))
    ids = {marker: tokenizer.token_to_id(marker) for marker in channels.markers}
    vocabulary = vocabulary_of(tokenizer.to_str(), tokenizer.get_vocab_size(), [tokenizer.token_to_id(EOS)])
    required = ToolUse((CLOCK,), ToolChoice(ToolChoiceMode.REQUIRED))
    reasoning = choose_formats("harmony", "auto", "").reasoning
    grammar = llguidance.LLMatcher.grammar_from_lark(call_grammar(channels, required, reasoning, token_ids=ids))
    answer = (
        "<|channel|>analysis<|message|>Hm <|.<|end|><|start|>assistant<|channel|>commentary to=functions.clock "
        '<|constrain|>json<|message|>{"city": "Rome"}'
    )
    as_tokens, as_text = tokenizer.encode(answer).ids, byte_vocabulary(()).encode(answer).ids
    for tokens, allowed in ((as_tokens, True), (as_text, False)):
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == allowed


def test_values_of_elements_follow_the_schema() -> None:
    tool = Tool("f", "", {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a"]})
    grammar = call_grammar(BY_NAME["qwen3_coder"], ToolUse((tool,), ToolChoice(ToolChoiceMode.REQUIRED)))

    def call(*parameters: str) -> str:
        return "<tool_call>\n<function=f>\n" + "".join(parameters) + "</function>\n</tool_call>"

    a, n = "<parameter=a>\nx\n</y>\n\n</parameter>\n", "<parameter=n>\n12\n</parameter>\n"
    assert allows(grammar, call(a, n))
    assert allows(grammar, call(a))
    assert not allows(grammar, call(n))
    assert not allows(grammar, call(a, n.replace("12", "many")))
