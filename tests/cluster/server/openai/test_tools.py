"""Tools and reasoning in /v1/chat/completions, through the official client."""

import json
from collections.abc import Iterator

import openai
import pytest

from answers import TWO_CALLS
from chat_templates import HARMONY, HERMES_THINK
from cluster.conversation.formats.harmony import HARMONY as HARMONY_FORMAT
from scripted_service import ScriptedService, scripted_service
from workers.messages import FinishReason

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = [{"role": "user", "content": "Weather in Kyōto?"}]
THOUGHT = "<think>\nI must look.\n</think>\n\n"


@pytest.fixture(scope="module")
def service() -> Iterator[ScriptedService]:
    with scripted_service(HERMES_THINK) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: ScriptedService) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


def chat(client: openai.OpenAI, **options):
    return client.chat.completions.create(
        **{"model": "scripted", "messages": ASK, "tools": [WEATHER, CLOCK], **options}
    )


def say(service: ScriptedService, text: str, finish: FinishReason = FinishReason.STOP, at_once: int = 1) -> None:
    service.engine.text, service.engine.finish_reason, service.engine.at_once = text, finish, at_once


@pytest.mark.parametrize("at_once", [1, 1000])
def test_calls_of_a_whole_answer(service: ScriptedService, client: openai.OpenAI, at_once: int) -> None:
    say(service, THOUGHT + TWO_CALLS["hermes"], at_once=at_once)
    (choice,) = chat(client).choices
    assert choice.finish_reason == "tool_calls"
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("get_weather", {"city": "Kyōto", "days": 2}), ("clock", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert choice.message.content == "I look."
    assert choice.message.reasoning_content == "I must look."
    assert '"name": "get_weather"' in service.engine.prompt


def test_a_stream_gives_the_same_message_bit_by_bit(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, THOUGHT + TWO_CALLS["hermes"], at_once=3)
    content, reasoning, calls, ends, arguments = "", "", [], [], 0
    for event in chat(client, stream=True):
        (choice,) = event.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        ends += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert (call.index, call.type) == (len(calls), "function")
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
            arguments += bool(call.function.arguments)
    assert (content, reasoning, ends) == ("I look.", "I must look.", ["tool_calls"])
    assert [(name, json.loads(text)) for name, text in calls] == [
        ("get_weather", {"city": "Kyōto", "days": 2}),
        ("clock", {}),
    ]
    assert arguments > 5


def test_the_client_puts_a_stream_together_by_itself(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"], at_once=2)
    with client.chat.completions.stream(model="scripted", messages=ASK, tools=[WEATHER, CLOCK]) as stream:
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "clock"]


def test_a_conversation_goes_on_with_the_results(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"])
    message = chat(client).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    say(service, "It is sunny.")
    answer = chat(client, messages=[*ASK, message, *results]).choices[0]
    assert (answer.message.content, answer.finish_reason, answer.message.tool_calls) == ("It is sunny.", "stop", None)
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Kyōto", "days": 2}}' in service.engine.prompt
    assert service.engine.prompt.count("sunny") == 2


def test_one_call_only_and_no_calls(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"])
    alone = chat(client, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in alone.message.tool_calls] == ["get_weather"]
    assert alone.finish_reason == "tool_calls"
    none = chat(client, tool_choice="none").choices[0]
    assert (none.message.content, none.message.tool_calls, none.finish_reason) == (TWO_CALLS["hermes"], None, "stop")
    assert "get_weather" not in service.engine.prompt.split("<|im_start|>user")[0]


def test_a_call_that_is_cut_off_is_no_whole_one(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"].partition(', "days')[0], FinishReason.LENGTH)
    choice = chat(client).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Kyōto"'


def test_reasoning_without_tools_and_without_being_shown(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, THOUGHT + "Hello")
    message = chat(client, tools=openai.omit).choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello", "I must look.")
    hidden = chat(client, extra_body={"include_reasoning": False}).choices[0].message
    assert (hidden.content, hasattr(hidden, "reasoning_content")) == ("Hello", False)
    response = client.responses.create(model="scripted", input="Hi")
    assert response.output_text == "Hello"


def test_an_answer_that_was_begun_goes_on_inside_its_reasoning(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, " look.\n</think>\n\nHello")
    begun = [*ASK, {"role": "assistant", "content": "<think>\nI think that I really must"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    message = chat(client, messages=begun, tools=openai.omit, extra_body=more).choices[0].message
    assert (message.reasoning_content, message.content) == ("look.", "Hello")
    assert service.engine.prompt.endswith("I really must")


def test_the_template_is_given_its_variables(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, "Hello")
    chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert service.engine.prompt.endswith("<think>\n\n</think>\n\n")


WRONG = {
    "tools[0].function.name is 'a b'": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "two tools are called": {"tools": [CLOCK, CLOCK]},
    "tool_choice names 'walk'": {"tool_choice": {"type": "function", "function": {"name": "walk"}}},
    "but the request has no tools": {"tools": [], "tool_choice": "required"},
    "it must be 'none', 'auto', 'required'": {"tool_choice": "sometimes"},
    "messages[0].tool_calls[0].function.arguments": {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [{"id": "x", "type": "function", "function": {"name": "clock", "arguments": "now"}}],
            }
        ]
    },
}


@pytest.mark.parametrize(("says", "options"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_refused_by_name(client: openai.OpenAI, says: str, options: dict) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert says in refused.value.message


def test_tools_of_a_model_whose_format_is_not_known_are_refused() -> None:
    with scripted_service("{{ messages[-1].content }}") as service, service.client() as client:
        with pytest.raises(openai.BadRequestError, match=r"model\.tool_format"):
            chat(client)
        say(service, "<tool_call>")
        assert chat(client, tools=openai.omit).choices[0].message.content == "<tool_call>"


def test_channels_are_told_by_special_tokens_and_not_by_their_spelling() -> None:
    special = HARMONY_FORMAT.markers
    with scripted_service(HARMONY, special) as service, service.client() as client:
        say(service, "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant" + TWO_CALLS["harmony"])
        for message in (
            chat(client).choices[0].message,
            chat(client, extra_body={"skip_special_tokens": False}).choices[0].message,
            chat(client, stop=["nowhere", "look.I look. not"]).choices[0].message,
        ):
            assert (message.content, message.reasoning_content) == ("I look.", "I must look.")
            assert [call.function.name for call in message.tool_calls] == ["get_weather", "clock"]
        assert service.engine.prompt.endswith("<|start|>assistant")
        stopped = chat(client, stop=["must"]).choices[0]
        assert (stopped.message.reasoning_content, stopped.message.content) == ("I", None)
        history = chat(client).choices[0].message
        say(service, "<|channel|>final<|message|>Sunny.")
        results = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in history.tool_calls]
        reasoned = {**history.model_dump(exclude_none=True), "reasoning_content": "I must look."}
        assert chat(client, messages=[*ASK, reasoned, *results]).choices[0].message.content == "Sunny."
        assert "<|start|>assistant to=functions.get_weather<|channel|>commentary" in service.engine.prompt
        assert "analysis<|message|>I must look.\nI look.<|end|>" in service.engine.prompt


FLAT = [{"type": "function", "strict": False, **tool["function"]} for tool in (WEATHER, CLOCK)]
FLAT[1]["parameters"] = None


def respond(client: openai.OpenAI, **options):
    return client.responses.create(**{"model": "scripted", "input": "Weather in Kyōto?", "tools": FLAT, **options})


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_response_has_calls_as_items_whole_and_streamed(
    service: ScriptedService, client: openai.OpenAI, at_once: int
) -> None:
    say(service, THOUGHT + TWO_CALLS["hermes"], at_once=at_once)
    whole = respond(client)
    assert '"name": "get_weather"' in service.engine.prompt
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    assert (whole.status, whole.output_text.strip(), whole.tool_choice) == ("completed", "I look.", "auto")
    assert [tool.name for tool in whole.tools] == ["get_weather", "clock"]
    calls = [(item.name, json.loads(item.arguments), item.status) for item in whole.output[1:]]
    assert calls == [("get_weather", {"city": "Kyōto", "days": 2}, "completed"), ("clock", {}, "completed")]
    assert len({item.call_id for item in whole.output[1:]} | {item.id for item in whole.output}) == 5

    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    arguments: dict[str, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            arguments[event.item_id] = arguments.get(event.item_id, "") + event.delta
    last = events[-1].response
    assert [(item.type, item.status) for item in last.output] == [(item.type, item.status) for item in whole.output]
    assert arguments == {item.id: item.arguments for item in last.output[1:]}
    assert [item.arguments for item in last.output[1:]] == [item.arguments for item in whole.output[1:]]
    added = [event.item for event in events if event.type == "response.output_item.added"]
    assert [(item.type, item.status) for item in added] == [(item.type, "in_progress") for item in whole.output]
    assert [item.arguments for item in added[1:]] == ["", ""]
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [(event.output_index, event.item.id) for event in done] == [
        (i, item.id) for i, item in enumerate(last.output)
    ]
    finished = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert finished == [item.arguments for item in last.output[1:]]


def test_a_response_that_is_cut_in_a_call_says_so(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"][:-30], finish=FinishReason.LENGTH)
    answer = respond(client)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in answer.output][-1] == "incomplete"
    assert {item.status for item in answer.output[:-1]} == {"completed"}


def test_calls_and_their_results_go_back_into_a_response(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"])
    asked = [{"role": "user", "content": "Weather?"}]
    first = respond(client, input=asked)
    called = [item.model_dump(exclude_none=True) for item in first.output]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": output}
        for item, output in zip(first.output[1:], ("sunny", [{"type": "input_text", "text": "noon"}]), strict=True)
    ]
    say(service, "Sunny at noon.")
    assert respond(client, input=[*asked, *called, *results]).output_text == "Sunny at noon."
    prompt = service.engine.prompt.partition("Weather?")[2]
    assert prompt.count("<tool_call>{") == 2
    assert prompt.count("assistant") == 2, "text and calls are one message, and the answer is to come"
    assert prompt.index("I look.") < prompt.index('"name": "clock", "arguments"') < prompt.index("sunny")
    assert prompt.index("sunny") < prompt.index("noon")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is of type 'web_search'"),
        ({"tools": [{"type": "function", "name": "a b"}]}, r"tools\[0\].name is 'a b'"),
        ({"tools": [], "tool_choice": "required"}, "the request has no tools"),
        ({"tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice names 'nobody'"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice is of type 'allowed_tools'",
        ),
        ({"tool_choice": "perhaps"}, "tool_choice is 'perhaps'"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, r"input\[0\] has no call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}]},
            "must be a JSON object",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, r"input\[0\] has no output"),
        ({"input": [{"type": "computer_call"}]}, r"input\[0\] is of type 'computer_call'"),
        ({"input": [{"role": "user"}]}, r"input\[0\] has no content"),
    ],
)
def test_what_is_wrong_with_tools_of_a_response_is_told(client: openai.OpenAI, options: dict, why: str) -> None:
    with pytest.raises(openai.BadRequestError, match=why):
        respond(client, **options)


def test_a_response_that_must_call_a_function_has_its_grammar(service: ScriptedService, client: openai.OpenAI) -> None:
    say(service, TWO_CALLS["hermes"])
    with pytest.raises(openai.BadRequestError, match="structured_output"):  # nobody compiles one here
        respond(client, tool_choice={"type": "function", "name": "clock"})
