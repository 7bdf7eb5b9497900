"""Conversations with tools and reasoning over gRPC."""

import json
from collections.abc import Iterator

import grpc
import pytest

from answers import CLOCK, TWO_CALLS, WEATHER
from chat_templates import HERMES_THINK
from cluster.client.client import AsyncBatonClient, BatonClient
from cluster.conversation.deltas import (
    ArgumentsDelta,
    ContentDelta,
    MessageBuilder,
    ReasoningDelta,
    ToolCallStarted,
)
from cluster.conversation.messages import ChatMessage, ToolCall, ToolChoice, ToolChoiceMode, ToolUse
from cluster.wire.chat import (
    deltas_from_proto,
    deltas_to_proto,
    messages_from_proto,
    messages_to_proto,
    tool_use_from_proto,
    tool_use_to_proto,
)
from protos import baton_pb2, baton_pb2_grpc
from scripted_service import ScriptedService, scripted_service
from workers.errors import InvalidRequestError
from workers.messages import FinishReason

TOOLS = [
    baton_pb2.Tool(name="get_weather", description="The weather", parameters='{"properties": {"city": {}}}'),
    baton_pb2.Tool(name="clock"),
]
USER = baton_pb2.ChatMessage(role="user", content="Weather?")


@pytest.fixture(scope="module")
def service() -> Iterator[ScriptedService]:
    with scripted_service(HERMES_THINK) as service:
        service.engine.text = "<think>\nHm.\n</think>\n\n" + TWO_CALLS["hermes"]
        yield service


@pytest.fixture(scope="module")
def stub(service: ScriptedService) -> Iterator[baton_pb2_grpc.BatonStub]:
    with grpc.insecure_channel(service.grpc.address) as channel:
        yield baton_pb2_grpc.BatonStub(channel)


def request(messages: list[baton_pb2.ChatMessage] | None = None, **fields: object) -> baton_pb2.GenerateRequest:
    chat = {"messages": messages or [USER], "tools": TOOLS, **fields}
    return baton_pb2.GenerateRequest(chat=baton_pb2.ChatMessages(**chat))


def test_deltas_stream_and_their_sum_is_the_whole_message(
    service: ScriptedService, stub: baton_pb2_grpc.BatonStub
) -> None:
    content, reasoning, calls = "", "", {}
    for response in stub.Generate(request()):
        content += response.chat_delta.content
        reasoning += response.chat_delta.reasoning
        for call in response.chat_delta.tool_calls:
            known = calls.setdefault(call.index, [call.id, call.name, ""])
            known[2] += call.arguments
        last = response
    assert (content, reasoning) == ("I look.", "Hm.")
    assert [(name, json.loads(text)) for _, name, text in calls.values()] == [
        ("get_weather", {"city": "Kyōto", "days": 2}),
        ("clock", {}),
    ]
    assert last.finish_reason == baton_pb2.FINISH_REASON_TOOL_CALLS
    whole = stub.GenerateOnce(request())
    assert whole.text == service.engine.text
    assert (whole.chat_delta.content, whole.chat_delta.reasoning) == (content, reasoning)
    assert [call.arguments for call in whole.chat_delta.tool_calls] == [text for _, _, text in calls.values()]


def test_a_conversation_with_calls_goes_on(service: ScriptedService, stub: baton_pb2_grpc.BatonStub) -> None:
    call = baton_pb2.ToolCall(id="c1", name="clock", arguments='{"city": "Rome"}')
    history = [
        USER,
        baton_pb2.ChatMessage(role="assistant", tool_calls=[call], reasoning="I must look."),
        baton_pb2.ChatMessage(role="tool", content="noon", tool_call_id="c1"),
    ]
    stub.GenerateOnce(request(history))
    prompt = service.engine.prompt
    assert "<think>I must look.</think>" in prompt
    assert '<tool_call>{"name": "clock", "arguments": {"city": "Rome"}}</tool_call>' in prompt
    assert prompt.index("arguments") < prompt.rindex("noon")
    none = stub.GenerateOnce(request(tool_choice=baton_pb2.ToolChoice(mode=baton_pb2.TOOL_CHOICE_MODE_NONE)))
    assert (none.chat_delta.tool_calls, none.finish_reason) == ([], baton_pb2.FINISH_REASON_STOP)
    one = stub.GenerateOnce(request(parallel_tool_calls=False))
    assert [call.name for call in one.chat_delta.tool_calls] == ["get_weather"]


@pytest.mark.parametrize("choice", [ToolChoice(ToolChoiceMode.REQUIRED), ToolChoice(ToolChoiceMode.NAMED, "clock")])
def test_the_wire_keeps_conversations_and_answers(choice: ToolChoice) -> None:
    call = ToolCall("c", "clock", '{"city": "Rome"}')
    messages = (ChatMessage("assistant", "x", (call,), reasoning_content="y"), ChatMessage("tool", "z", (), "c", "n"))
    assert messages_from_proto(messages_to_proto(messages)) == messages
    use = ToolUse((WEATHER, CLOCK), choice, parallel=False)
    assert tool_use_from_proto(baton_pb2.ChatMessages(**tool_use_to_proto(use))) == use
    deltas = (ReasoningDelta("y"), ContentDelta("x"), ToolCallStarted(0, "c", "clock"), ArgumentsDelta(0, "{}"))
    assert deltas_from_proto(deltas_to_proto(deltas)) == deltas


def test_the_client_has_the_deltas(service: ScriptedService) -> None:
    builder = MessageBuilder()
    with BatonClient(service.grpc) as client:
        for chunk in client.generate(chat=[("user", "Hi")]):
            builder.add(chunk.deltas or ())
        assert chunk.finish_reason is FinishReason.STOP
    assert builder.message.reasoning_content == "Hm."
    assert builder.message.content == TWO_CALLS["hermes"]


WRONG = {
    "tools[0].name is 'a b'": {"tools": [baton_pb2.Tool(name="a b")]},
    "tools[0].parameters is no JSON": {"tools": [baton_pb2.Tool(name="a", parameters="{")]},
    "tools[0].parameters is a list": {"tools": [baton_pb2.Tool(name="a", parameters="[]")]},
    "tools has 129 entries, at most 128": {"tools": [baton_pb2.Tool(name=f"f{i}") for i in range(129)]},
    "tool_choice names 'walk'": {"tool_choice": baton_pb2.ToolChoice(function="walk")},
    "the request has no tools": {"tools": [], "tool_choice": baton_pb2.ToolChoice(function="walk")},
    "messages[0] of role 'user' has tool_calls": {
        "messages": [baton_pb2.ChatMessage(role="user", tool_calls=[baton_pb2.ToolCall(name="f")])]
    },
    "messages[0].tool_calls[0].arguments is 'now'": {
        "messages": [
            baton_pb2.ChatMessage(role="assistant", tool_calls=[baton_pb2.ToolCall(name="f", arguments="now")])
        ]
    },
}


@pytest.mark.parametrize(("says", "fields"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_refused_by_name(stub: baton_pb2_grpc.BatonStub, says: str, fields: dict) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.GenerateOnce(request(**fields))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in refused.value.details()


FUNCTIONS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"properties": {"city": {}}}}},
    {"type": "function", "function": {"name": "clock"}},
]


def test_the_client_calls_tools_and_goes_on_with_their_answers(service: ScriptedService) -> None:
    conversation: list = [{"role": "user", "content": "Weather?"}]
    with BatonClient(service.grpc) as client:
        plain = client.tokenize(chat=conversation)
        assert len(client.tokenize(chat=conversation, tools=FUNCTIONS)) > len(plain)
        builder = MessageBuilder()
        for chunk in client.generate(chat=conversation, tools=FUNCTIONS, tool_choice="auto"):
            builder.add(chunk.deltas or ())
        assert chunk.finish_reason is FinishReason.TOOL_CALLS
        answer = client.generate_once(chat=conversation, tools=FUNCTIONS).message
        assert (answer.content, answer.reasoning_content) == ("I look.", "Hm.")
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [
            ("get_weather", {"city": "Kyōto", "days": 2}),
            ("clock", {}),
        ]
        calls = [(call.name, call.arguments) for call in answer.tool_calls]
        assert [(call.name, call.arguments) for call in builder.message.tool_calls] == calls
        result = {"role": "tool", "content": "sunny", "tool_call_id": answer.tool_calls[0].id}
        client.generate_once(chat=[*conversation, answer, result], tools=FUNCTIONS)
        prompt = service.engine.prompt
        assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Kyōto", "days": 2}}</tool_call>' in prompt
        assert "sunny" in prompt
        function = {"name": "clock", "arguments": '{"city": "Rome"}'}
        said = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        }
        noon = {"role": "tool", "content": "noon", "tool_call_id": "c1"}
        client.generate_once(chat=[*conversation, said, noon], tools=FUNCTIONS, parallel_tool_calls=False)
        assert '<tool_call>{"name": "clock", "arguments": {"city": "Rome"}}</tool_call>' in service.engine.prompt


async def test_the_asyncio_client_takes_the_same(service: ScriptedService) -> None:
    named = {"type": "function", "function": {"name": "nobody"}}
    async with AsyncBatonClient(service.grpc) as client:
        answer = await client.generate_once(chat=[("user", "Weather?")], tools=FUNCTIONS)
        assert len(answer.message.tool_calls) == 2
        for wrong, why in (
            ({"tools": FUNCTIONS, "tool_choice": named}, "tool_choice names 'nobody'"),
            ({"tool_choice": "required"}, "the request has no tools"),
            ({"tools": [{"type": "function"}]}, r"tools\[0\]\.function is missing"),
        ):
            with pytest.raises(InvalidRequestError, match=why):
                await client.generate_once(chat=[("user", "Weather?")], **wrong)
        with pytest.raises(InvalidRequestError, match="tools is given without chat"):
            await client.generate_once("Weather?", tools=FUNCTIONS)
        with pytest.raises(InvalidRequestError, match="did you mean tools"):
            await client.tokenize(chat=[("user", "Weather?")], tolls=FUNCTIONS)
