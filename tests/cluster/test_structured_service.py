"""Structured output through the front door: client, gateway, workers, and back."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import grpc
import jsonschema
import pytest
import pytest_asyncio

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.launch import Service, launch
from cluster.server.grpc.serve import start_server
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_checkpoint) -> AsyncIterator[tuple[Service, AsyncBatonClient]]:
    """Two workers of each kind in this process."""
    overrides = {"model.path": str(tiny_checkpoint("llama")), "server.port": 0, "handoff.connector": "local"}
    overrides |= {f"{role}.{name}": value for role in ("prefill", "decode") for name, value in POOL.items()}
    config = load_config(environ={}, overrides=overrides)
    async with launch(config, lambda line: None) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:
            yield service, client
        await server.stop()


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
    _, client = served
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
    service, client = served
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
    service, client = served
    before = [worker.load for worker in service.engine.workers()]
    with pytest.raises(BatonClientError, match=re.escape(message)) as refused:
        await whole_answer(client, "a", sampling=raw(wanted))
    assert refused.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert [worker.load for worker in service.engine.workers()] == before


async def test_an_answer_goes_on_in_its_form_when_its_worker_is_lost(served) -> None:
    service, client = served
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
