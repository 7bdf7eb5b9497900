"""Messages and tools of a request: what is taken, and what is refused by name."""

import pytest

from cluster.conversation.messages import ChatMessage, Tool, ToolCall, ToolChoice, ToolChoiceMode
from cluster.conversation.read_messages import MAX_CALLS, read_messages
from cluster.conversation.read_tools import MAX_TOOLS, read_tool_use
from workers.errors import InvalidRequestError

CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def test_a_conversation_with_calls_and_their_results() -> None:
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": "time?"}]
    assert read_messages(
        [
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        ]
    ) == (
        ChatMessage("user", "What\ntime?", name="ann"),
        ChatMessage("assistant", tool_calls=(ToolCall("c1", "clock", '{"a": 1}'),), reasoning_content="Hm."),
        ChatMessage("tool", "noon", tool_call_id="c1"),
    )


WRONG_MESSAGES = {
    "messages is a text, it must be a list": "hello",
    r"messages\[0\] is a text": ["hello"],
    r"messages\[0\].role is missing": [{"content": "x"}],
    r"messages\[0\].role is a number": [{"role": 1, "content": "x"}],
    r"messages\[0\].content is missing": [{"role": "user"}],
    r"messages\[0\].content is a number": [{"role": "user", "content": 3}],
    r"messages\[0\].content\[1\] is of type 'image_url'": [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}
    ],
    r"messages\[0\].tool_calls is set in a message of role 'user'": [
        {"role": "user", "content": "x", "tool_calls": [CALL]}
    ],
    r"tool_calls\[0\].function.arguments is '\[1\]'": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
    ],
    r"tool_calls\[0\].function.name is missing": [{"role": "assistant", "tool_calls": [{"function": {}}]}],
    r"tool_calls\[0\].type is 'custom'": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}],
    f"has {MAX_CALLS + 1} entries, at most 128": [{"role": "assistant", "tool_calls": [CALL] * (MAX_CALLS + 1)}],
    "function_call is not supported": [{"role": "assistant", "content": "x", "function_call": {}}],
}


@pytest.mark.parametrize(("says", "messages"), WRONG_MESSAGES.items())
def test_wrong_messages_are_refused_where_they_are_wrong(says: str, messages: object) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        read_messages(messages)


def test_tools_and_choices() -> None:
    use = read_tool_use([TOOL], {"type": "function", "function": {"name": "clock"}}, False)
    assert use is not None
    assert use.tools == (Tool("clock", "", {"type": "object", "properties": {}}),)
    assert (use.choice, use.parallel) == (ToolChoice(ToolChoiceMode.NAMED, "clock"), False)
    modes = [read_tool_use([TOOL], each) for each in (None, "auto", "required", "none")]
    assert [use and use.choice.mode.value for use in modes] == ["auto", "auto", "required", "none"]
    assert [use and len(use.callable) for use in modes] == [1, 1, 1, 0]
    assert read_tool_use(None, "auto", True) is None


def named(name: str) -> dict:
    return {"function": {"name": name}}


WRONG_TOOLS = {
    "tools is an object, it must be a list": ({}, None),
    r"tools\[0\] is a text": (["clock"], None),
    r"tools\[0\].type is 'web_search'": ([{"type": "web_search"}], None),
    r"tools\[0\].function is missing": ([{"type": "function"}], None),
    r"tools\[0\].function.name is 'a b'": ([named("a b")], None),
    r"tools\[0\].function.name is None": ([{"function": {}}], None),
    r"parameters.type is 'string'": ([{"function": {"name": "f", "parameters": {"type": "string"}}}], None),
    r"parameters is a list": ([{"function": {"name": "f", "parameters": []}}], None),
    "two tools are called 'f'": ([named("f"), named("f")], None),
    "129 entries, at most 128": ([named(f"f{i}") for i in range(MAX_TOOLS + 1)], None),
    "the tools take": ([{"function": {"name": "f", "description": "x" * 2**21}}], None),
    "tool_choice is 'required', but the request has no tools": (None, "required"),
    "tool_choice is 'sometimes', it must be 'none', 'auto', 'required'": ([named("f")], "sometimes"),
    "tool_choice names 'g', but the tools are f": ([named("f")], {"type": "function", **named("g")}),
}


@pytest.mark.parametrize(("says", "given"), WRONG_TOOLS.items())
def test_wrong_tools_are_refused(says: str, given: tuple[object, object]) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        read_tool_use(*given)


def test_schemas_that_are_too_deep_are_refused_and_not_followed() -> None:
    schema: dict = {}
    for _ in range(5000):
        schema = {"properties": schema}
    with pytest.raises(InvalidRequestError, match="nested deeper than 128"):
        read_tool_use([{"function": {"name": "f", "parameters": {"properties": schema}}}])
