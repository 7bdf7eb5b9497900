"""What stands between a conversation and text: prompts, grammars of forced calls, places of special tokens."""

import pytest

from answers import CLOCK, WEATHER
from chat_templates import HARMONY, HERMES_THINK, MISTRAL
from cluster.api import ModelInfo
from cluster.conversation.deltas import ContentDelta, ReasoningDelta
from cluster.conversation.formats.harmony import HARMONY as HARMONY_FORMAT
from cluster.conversation.formats.mistral import MISTRAL_V11
from cluster.conversation.messages import ChatMessage, ToolChoice, ToolChoiceMode, ToolUse
from cluster.conversation.registry import NO_FORMATS, choose_formats
from cluster.generation.conversations import Conversation, Conversations
from cluster.generation.marker_positions import MarkerPositions
from cluster.generation.text_generation import Generation, GenerationRequest
from scripted_service import TextEngine, byte_tokenizer
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

ASK = (ChatMessage("user", "Weather?"),)
REQUIRED = ToolUse((WEATHER, CLOCK), ToolChoice(ToolChoiceMode.REQUIRED))


def conversations(template: str, special: tuple[str, ...] = ()) -> Conversations:
    return Conversations(byte_tokenizer(template, special), choose_formats("auto", "auto", template))


def ids(text: str):
    return as_token_ids(byte_tokenizer("").encode(text))


def test_only_a_forced_call_has_a_grammar_and_reasoning_goes_first() -> None:
    hermes = conversations(HERMES_THINK)
    assert hermes.call_grammar(Conversation(ASK, tool_use=ToolUse((CLOCK,))), ids("x")) is None
    assert hermes.call_grammar(Conversation(ASK), ids("x")) is None
    free = hermes.call_grammar(Conversation(ASK, tool_use=REQUIRED), ids("assistant\n"))
    opened = hermes.call_grammar(Conversation(ASK, tool_use=REQUIRED), ids("assistant\n<think>\n"))
    assert free is not None
    assert opened is not None
    assert free.startswith("start: thought? ")
    assert opened.startswith("start: thought ")
    assert "call_1" in free
    named = ToolUse((WEATHER, CLOCK), ToolChoice(ToolChoiceMode.NAMED, "clock"))
    only = hermes.call_grammar(Conversation(ASK, tool_use=named), ids("x"))
    assert only is not None
    assert ("clock" in only, "get_weather" in only) == (True, False)


def test_special_tokens_are_in_the_grammar_by_id() -> None:
    mistral = conversations(MISTRAL, MISTRAL_V11.markers)
    assert sorted(mistral.marker_ids.values()) == sorted(MISTRAL_V11.markers)
    token = {text: token_id for token_id, text in mistral.marker_ids.items()}["[TOOL_CALLS]"]
    grammar = mistral.call_grammar(Conversation(ASK, tool_use=REQUIRED), ids("x"))
    assert grammar is not None
    assert f'call_0: <[{token}]> "get_weather"' in grammar


def test_a_model_of_no_known_format_calls_only_when_it_must() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    plain = Conversations(byte_tokenizer(template), NO_FORMATS)
    with pytest.raises(InvalidRequestError, match=r"model\.tool_format"):
        plain.render(Conversation(ASK, tool_use=ToolUse((CLOCK,))))
    forced = Conversation(ASK, tool_use=REQUIRED)
    assert '{"name": "NAME", "parameters": ARGUMENTS}' in plain.render(forced)
    assert 'call_1: "{\\"name\\": \\"clock\\"' in (plain.call_grammar(forced, ids("x")) or "")
    reader = plain.reader(forced, ids("x"))
    assert reader is not None
    reader.read('{"name": "clock", "parameters": {}}', (), ended=True)
    assert reader.calls_tools
    assert plain.reader(Conversation(ASK), ids("x")) is None


async def test_what_stands_before_a_special_token_stays_before_it() -> None:
    tokenizer = byte_tokenizer(HARMONY, HARMONY_FORMAT.markers)
    formats = choose_formats("auto", "auto", HARMONY)
    unfinished = tokenizer.encode("é")[:1]
    begin, end = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>Hi")
    )
    engine = TextEngine(tokenizer, token_ids=(*begin, *unfinished, *end), at_once=99)
    info = ModelInfo("scripted", "llama", "float32", 512, tokenizer.vocab_size, tuple(tokenizer.eos_token_ids), True)
    generation = Generation(engine, tokenizer, info, formats=formats)
    request = GenerationRequest(request_id="r", prompt=Conversation(ASK), sampling=SamplingParams(), timeout_s=60)
    deltas = [delta async for chunk in generation.generate(request) for delta in chunk.deltas or ()]
    assert deltas == [ReasoningDelta("\ufffd"), ContentDelta("Hi")]


async def test_each_sample_is_taken_apart_by_itself() -> None:
    tokenizer = byte_tokenizer(HARMONY, HARMONY_FORMAT.markers)
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi \u00e9"
    engine = TextEngine(tokenizer, token_ids=tuple(tokenizer.encode(text, add_special_tokens=False)), at_once=3)
    info = ModelInfo("scripted", "llama", "float32", 512, tokenizer.vocab_size, tuple(tokenizer.eos_token_ids), True)
    generation = Generation(engine, tokenizer, info, formats=choose_formats("auto", "auto", HARMONY))
    sampling = SamplingParams(n=3)
    request = GenerationRequest(request_id="r", prompt=Conversation(ASK), sampling=sampling, timeout_s=60)
    said: dict[tuple[int, type], str] = {}
    async for chunk in generation.generate(request):
        for delta in chunk.deltas or ():
            key = (chunk.index, type(delta))
            said[key] = said.get(key, "") + delta.text
    expected = {ReasoningDelta: "Hm.", ContentDelta: "Hi \u00e9"}
    assert said == {(index, kind): text for index in range(3) for kind, text in expected.items()}


def test_markers_wait_for_the_text_before_them() -> None:
    positions = MarkerPositions()
    positions.add("a", 0)
    positions.add("b", 3)
    positions.add("c", 5)
    assert positions.send(2) == ((0, "a"),)
    assert positions.send(1) == ((1, "b"),)
    assert positions.send(0) == ()
    assert positions.send(7) == ((2, "c"),)
