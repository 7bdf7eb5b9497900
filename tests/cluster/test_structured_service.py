"""Structured output through the front door: client, gateway, workers, and back."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import jsonschema
import openai
import pytest
import pytest_asyncio

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.launch import Service, launch
from cluster.server.doors import Doors
from cluster.wire.sampling import sampling_from_proto, sampling_to_proto
from fleet import prompt
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams
from workers.structured_output import MAX_BYTES, StructuredOutput

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = StructuredOutput.regex("([0-9]{4}-){12}[a-f]{8}")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ages": {"type": "array", "items": {"enum": [1, 20]}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}


@dataclass
class Served:
    """A running service and how to reach it."""

    service: Service
    client: AsyncBatonClient
    http_url: str

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.http_url}/v1", api_key="none", max_retries=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_checkpoint) -> AsyncIterator[Served]:
    """Two workers of each kind in this process, behind both doors."""
    overrides = {"model.path": str(tiny_checkpoint("llama")), "handoff.connector": "local"}
    overrides |= {"server.port": 0, "server.http.port": 0}
    overrides |= {f"{role}.{name}": value for role in ("prefill", "decode") for name, value in POOL.items()}
    config = load_config(environ={}, overrides=overrides)
    async with launch(config, lambda line: None) as service:
        doors = Doors(config.server)
        await doors.open()
        await doors.serve(service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(doors.address)) as client:
            yield Served(service, client, doors.http_url)
        await doors.stop(grace_s=0)


async def whole_answer(client: AsyncBatonClient, text: str | None = None, **options) -> tuple[str, list[int], object]:
    """Text, tokens and last part of an answer."""
    chunks = [chunk async for chunk in client.generate(text, **options)]
    return "".join(c.text for c in chunks), [token for c in chunks for token in c.token_ids], chunks[-1]


POOL = {"replicas": 2, "num_blocks": 128, "device": "cpu"}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(structured_output=StructuredOutput.json_schema({"type": "null"}, disable_any_whitespace=True)),
        SamplingParams(structured_output=StructuredOutput.json_object()),
        SamplingParams(structured_output=StructuredOutput.regex("a|b"), logit_bias=((1, 2.5), (3, -100.0))),
        SamplingParams(structured_output=StructuredOutput.grammar('root ::= "a"'), bad_words=("x", "y z")),
        SamplingParams(structured_output=StructuredOutput.choice(["a", "b"]), allowed_token_ids=(1, 2)),
    ],
)
async def test_the_wire_keeps_every_field(sampling: SamplingParams) -> None:
    assert sampling_from_proto(sampling_to_proto(sampling)) == sampling


async def test_answers_have_the_form_that_was_asked_for(served) -> None:
    client = served.client
    wanted = StructuredOutput.json_schema(SCHEMA, disable_any_whitespace=True)

    async def answer(seed: int, wanted: StructuredOutput):
        sampling = SamplingParams(seed=seed, max_tokens=300)
        return await whole_answer(client, "the cat", sampling=sampling, structured_output=wanted)

    several = await asyncio.gather(*(answer(seed, wanted) for seed in range(4)))
    for text, _, last in several:
        assert last.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len({text for text, _, _ in several}) > 1
    assert (await answer(0, StructuredOutput.choice(["yes", "no, thanks"])))[0] in ("yes", "no, thanks")
    assert re.fullmatch("[0-9]{3}x", (await answer(0, StructuredOutput.regex("[0-9]{3}x")))[0])
    assert (await answer(0, StructuredOutput.grammar('root ::= "<" root ">" | "fox"')))[0].strip("<>") == "fox"


async def test_biases_and_bad_words_reach_the_workers(served) -> None:
    service, client = served.service, served.client
    plain = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    _, tokens, _ = await whole_answer(client, "the cat", sampling=SamplingParams(**plain), logit_bias={42: 100.0})
    assert tokens == [42] * 8
    fox = (await service.generation.tokenize("fox")).tolist()
    biased = tuple((token, 50.0) for token in fox)
    text, _, _ = await whole_answer(client, "the cat", sampling=SamplingParams(**plain, logit_bias=biased))
    assert "fox" in text or len(fox) > 1
    sampling = SamplingParams(**plain, logit_bias=biased, bad_words=("fox",))
    assert "fox" not in (await whole_answer(client, "the cat", sampling=sampling))[0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"type": "strin"}, "json_schema cannot be used: Invalid type: strin"),
        ({"type": "string", "unheardOf": {}, "uniqueItems": True}, "uniqueItems"),
        ("(a", "regex cannot be used"),
        ("a" * (MAX_BYTES + 1), f"structured_output.regex has {MAX_BYTES + 1} bytes, at most {MAX_BYTES} are allowed"),
    ],
)
async def test_what_cannot_be_is_refused_at_the_door(served, wanted, message: str) -> None:
    service, client = served.service, served.client
    before = [worker.load for worker in service.engine.workers()]
    with pytest.raises(BatonClientError, match=re.escape(message)) as refused:
        await whole_answer(client, "a", sampling=raw(wanted))
    assert refused.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert [worker.load for worker in service.engine.workers()] == before


ASKING = {
    "response_format": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "who", "strict": True, "schema": SCHEMA}}
    },
    "structured_outputs": {"extra_body": {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}},
    "guided_json": {"extra_body": {"guided_json": json.dumps(SCHEMA)}},
}


@pytest.mark.parametrize("how", ASKING)
async def test_chats_over_http_have_the_form_that_was_asked_for(served, how: str) -> None:
    async with served.openai() as client:
        chat = {"model": "", "messages": [{"role": "user", "content": "who?"}], "max_tokens": 400, "seed": 5}
        whole = await client.chat.completions.create(**chat, **ASKING[how])
        parts = [part async for part in await client.chat.completions.create(**chat, **ASKING[how], stream=True)]
    assert whole.choices[0].finish_reason == "stop"
    text = whole.choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text


async def test_completions_and_responses_over_http_too(served) -> None:
    async with served.openai() as client:
        asked = {"model": "", "prompt": "is it?", "seed": 1, "max_tokens": 40}
        for name in ("structured_outputs", "guided_"):
            forms = {"choice": ["yes", "no"], "regex": "[0-9]{2}x", "grammar": 'root ::= "fox" | "dog"'}
            for form, value in forms.items():
                body = {name: {form: value}} if name == "structured_outputs" else {name + form: value}
                text = (await client.completions.create(**asked, extra_body=body)).choices[0].text
                assert text in ("yes", "no", "fox", "dog") or re.fullmatch("[0-9]{2}x", text)
        biased = await client.completions.create(**asked, temperature=0, logit_bias={"42": 100})
        extra = {"return_token_ids": True, "allowed_token_ids": [42], "ignore_eos": True}
        only = await client.completions.create(**asked, temperature=0, extra_body=extra)
        assert biased.choices[0].text == only.choices[0].text
        assert set(only.choices[0].token_ids) == {42}
        form = {"type": "json_schema", "name": "who", "schema": SCHEMA, "strict": True}
        answer = await client.responses.create(model="", input="who?", max_output_tokens=400, text={"format": form})
        jsonschema.validate(json.loads(answer.output_text), SCHEMA)


ROLL = {
    "type": "object",
    "properties": {"sides": {"enum": [6, 20]}},
    "required": ["sides"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "roll", "description": "dice", "parameters": ROLL}},
    {"type": "function", "function": {"name": "toss", "parameters": {**ROLL, "properties": {}, "required": []}}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "roll"}}])
async def test_a_model_that_must_call_a_function_calls_one(served, choice: str | dict) -> None:
    chat = {"model": "", "messages": [{"role": "user", "content": "dice?"}], "max_tokens": 400, "seed": 2}
    chat |= {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    async with served.openai() as client:
        (whole,) = (await client.chat.completions.create(**chat)).choices
        parts = [part async for part in await client.chat.completions.create(**chat, stream=True)]
        with pytest.raises(openai.BadRequestError, match="tool_choice wants a call, and response_format"):
            await client.chat.completions.create(**chat, response_format={"type": "json_object"})
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    assert call.function.name == "roll" or choice == "required"
    if call.function.name == "roll":
        jsonschema.validate(json.loads(call.function.arguments), ROLL)
    streamed = [each for part in parts if part.choices for each in part.choices[0].delta.tool_calls or []]
    assert "".join(each.function.arguments or "" for each in streamed) == call.function.arguments


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "has no schema"),
        ({"response_format": {"type": "xml"}}, "'xml'; text, json_object and json_schema are supported"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "response_format and guided_regex are given",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs has regex and choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag is not supported"),
        ({"guided_json": {"type": "strin"}}, "json_schema cannot be used: Invalid type: strin"),
        ({"logit_bias": {"x": 1}}, "logit_bias has the key x"),
        ({"logit_bias": {"3": 101}}, r"a logit_bias is 101.0, it must be in \[-100.0, 100.0\]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
    ],
)
async def test_what_cannot_be_is_refused_over_http(served, body: dict, message: str) -> None:
    async with served.openai() as client:
        asked = {"prompt": "a", "max_tokens": 2, **body}
        with pytest.raises(openai.BadRequestError, match=message):
            await client.post("/completions", body=asked, cast_to=object)


async def test_an_answer_goes_on_in_its_form_when_its_worker_is_lost(served) -> None:
    service, client = served.service, served.client
    sampling = SamplingParams(seed=3, max_tokens=300)
    options = {"token_ids": prompt(30), "sampling": sampling, "structured_output": LONG}
    whole, _, _ = await whole_answer(client, **options)
    assert re.fullmatch(LONG.text, whole)
    text, crashed = "", False
    async for chunk in client.generate(**options):
        text += chunk.text
        busy = [w for w in service.engine.workers() if w.role == "decode" and w.load.running]
        if not crashed and len(text) > 8 and busy:
            crashed = True
            service.engine.pools.find(busy[0].engine_id).handle.crash("killed by the test")
    assert text == whole
    assert chunk.report.attempts == 2


def raw(wanted: object) -> SamplingParams:
    """Parameters that the client itself would refuse to make."""
    form = StructuredOutput.json_schema(wanted) if isinstance(wanted, dict) else StructuredOutput.regex("a")
    if isinstance(wanted, str):
        object.__setattr__(form, "text", wanted)
    return SamplingParams(structured_output=form)
