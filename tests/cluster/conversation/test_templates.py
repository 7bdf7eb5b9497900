"""Formats found from chat templates, and conversations with calls as each kind of template writes them."""

import pytest

import chat_templates
from answers import CLOCK, USE, WEATHER, read
from cluster.config.load import load_config
from cluster.conversation.answer import AnswerParser
from cluster.conversation.messages import ChatMessage, ToolCall
from cluster.conversation.registry import choose_formats
from scripted_service import byte_tokenizer
from workers.errors import ConfigError, InvalidRequestError

HISTORY = (
    ChatMessage("user", "Weather in Rome?"),
    ChatMessage("assistant", "", (ToolCall("abcdefghi", "get_weather", '{"city": "Rome"}'),), reasoning_content="Hm."),
    ChatMessage("tool", "Sun", tool_call_id="abcdefghi"),
)
TEMPLATES = {
    "hermes": (
        chat_templates.HERMES_THINK,
        "think",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}',
    ),
    "deepseek_v3": (
        chat_templates.DEEPSEEK_V3,
        "think",
        'function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>',
    ),
    "harmony": (
        chat_templates.HARMONY,
        "harmony",
        "analysis<|message|>Hm.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
        '{"city": "Rome"}<|call|>',
    ),
    "llama3_json": (chat_templates.LLAMA3, None, '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'),
    "mistral_v11": (chat_templates.MISTRAL, None, '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Rome"}'),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_its_format_and_writes_calls_in_it(name: str) -> None:
    template, reasoning, written = TEMPLATES[name]
    formats = choose_formats("auto", "auto", template)
    assert formats.tools is not None
    assert formats.tools.name == name
    assert (formats.reasoning.name if formats.reasoning else None) == reasoning
    tokenizer = byte_tokenizer(template)
    prompt = tokenizer.apply_chat_template(HISTORY, tools=[WEATHER, CLOCK], tool_format=formats.tools)
    assert written in prompt
    assert "The weather in a city" in prompt
    assert prompt.index("Weather in Rome?") < prompt.index(written) < prompt.index("Sun", prompt.index(written))


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_is_what_the_parser_reads(name: str) -> None:
    template, _, _ = TEMPLATES[name]
    tokenizer, formats = byte_tokenizer(template), choose_formats("auto", "none", template)
    asked, answered = (
        tokenizer.apply_chat_template(HISTORY[:count], tool_format=formats.tools, add_generation_prompt=False)
        for count in (1, 2)
    )
    # Of the header of the answer, which the model does not write, only Llama's would stand in a call's way.
    text = answered.removeprefix(asked).rpartition("<|end_header_id|>\n\n")[2]
    message = read(AnswerParser(formats, USE), [text])
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("get_weather", '{"city": "Rome"}')]


def test_a_template_that_takes_no_tools_is_given_them_in_the_systems_message() -> None:
    formats = choose_formats("auto", "auto", chat_templates.DEEPSEEK_V3)
    tokenizer = byte_tokenizer(chat_templates.DEEPSEEK_V3)
    system = ChatMessage("system", "Be brief.")
    prompt = tokenizer.apply_chat_template([system, *HISTORY], tools=[CLOCK], tool_format=formats.tools)
    before = prompt[: prompt.index("Weather in Rome?")]
    assert before.startswith("Be brief.\n\n## Tools")
    assert "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>" in before
    assert '"city": {"type": "string"}' in before
    assert "## Tools" not in tokenizer.apply_chat_template(HISTORY, tool_format=formats.tools)


def test_what_a_template_refuses_is_the_clients_error() -> None:
    two = ChatMessage("assistant", "", HISTORY[1].tool_calls * 2)
    with pytest.raises(InvalidRequestError, match="one call at a time"):
        byte_tokenizer(chat_templates.LLAMA3).apply_chat_template([HISTORY[0], two])


def test_developers_are_the_system_where_the_template_does_not_know_them() -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    messages = [ChatMessage("developer", "x"), ChatMessage("user", "y")]
    assert byte_tokenizer(template).apply_chat_template(messages) == "[system] x [user] y "
    assert byte_tokenizer(template + "{# developer #}").apply_chat_template(messages) == "[developer] x [user] y "


OTHERS = {
    "Apriel": '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls> in <tool_call>',
    "GLM": "<tool_call>name\n<arg_key>city</arg_key>",
    "plain": "{{ messages[0].content }}",
    "Phi": "<|end|>{{ messages }}",
}


@pytest.mark.parametrize("template", OTHERS.values(), ids=OTHERS)
def test_other_templates_are_not_taken_for_any_format(template: str) -> None:
    formats = choose_formats("auto", "auto", template)
    assert (formats.tools, formats.reasoning) == (None, None)


def test_settings_name_formats_and_their_aliases() -> None:
    named = choose_formats("qwen3_xml", "deepseek_r1", chat_templates.HARMONY)
    assert named.tools is not None
    assert named.reasoning is not None
    assert (named.tools.name, named.reasoning.name) == ("qwen3_coder", "think")
    assert choose_formats("none", "none", chat_templates.HERMES_THINK) == choose_formats("none", "none", "")
    assert choose_formats("auto", "auto", "", "gpt_oss").tools == choose_formats("harmony", "none", "").tools


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.tool_format", "hermse", "model.tool_format is 'hermse', it must be one of .*; did you mean hermes"),
        ("model.reasoning_format", "thinking", "it must be one of auto, none, .*; did you mean think"),
    ],
)
def test_names_that_do_not_exist_are_refused_with_the_nearest(key: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(environ={}, overrides={key: value})
