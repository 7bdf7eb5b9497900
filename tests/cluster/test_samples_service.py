"""Several samples and prompt log-probabilities over gRPC, from a whole service in one process."""

from __future__ import annotations

import asyncio
import json
import random
import re

import grpc
import pytest
import pytest_asyncio
import torch

from cluster.cli.main import main
from cluster.client.client import AsyncBatonClient, BatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.launch import launch
from cluster.server.grpc.serve import start_server
from protos import baton_pb2
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput

PROMPT = [random.Random(7).randrange(3, 500) for _ in range(45)]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def connection(tiny_checkpoint):
    overrides = {
        "model.path": str(tiny_checkpoint("llama")),
        "model.max_model_len": 256,
        "server.port": 0,
        "server.max_n": 5,
        "handoff.connector": "local",
        "prefill.max_num_batched_tokens": 16,
    }
    config = load_config(environ={}, overrides=overrides)
    async with launch(config, lambda line: None) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        yield Connection(server.address)
        await server.stop(grace_s=0)


async def test_samples_and_prompt_logprobs_reach_the_client(connection, tiny_checkpoint):
    import transformers

    sampling = SamplingParams(seed=3, n=3, max_tokens=9, ignore_eos=True, logprobs=1, prompt_logprobs=2)
    async with AsyncBatonClient(connection) as client:
        chunks = [chunk async for chunk in client.generate(token_ids=PROMPT, sampling=sampling)]
        alone = [
            [t async for c in client.generate(token_ids=PROMPT, sampling=sampling.of_sample(i)) for t in c.token_ids]
            for i in range(3)
        ]
    samples = [[t for chunk in chunks if chunk.index == i for t in chunk.token_ids] for i in range(3)]
    assert samples == alone
    ends = [chunk.index for chunk in chunks if chunk.finish_reason is FinishReason.LENGTH]
    assert sorted(ends) == [0, 1, 2]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (45, 27)
    assert [bool(chunk.prompt_logprobs) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)

    def whole():
        with BatonClient(connection) as client:
            return client.generate_once(token_ids=PROMPT, sampling=sampling)

    answer = await asyncio.to_thread(whole)
    assert [list(sample.token_ids) for sample in answer.samples] == samples
    assert [sample.index for sample in answer.samples] == [0, 1, 2]
    assert (list(answer.token_ids), answer.text, answer.index) == (samples[0], answer.samples[0].text, 0)
    assert answer.usage == chunks[-1].usage
    assert answer.prompt_logprobs == chunks[0].prompt_logprobs

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    assert [position.chosen.token_id for position in answer.prompt_logprobs] == PROMPT[1:]
    for place, position in enumerate(answer.prompt_logprobs):
        assert position.chosen.logprob == pytest.approx(expected[place, PROMPT[place + 1]].item(), abs=1e-4)
        assert [top.token_id for top in position.top] == expected[place].topk(2).indices.tolist()


async def test_the_command_line_prints_every_sample(connection, capsys):
    said = (
        "generate",
        "a cat",
        "--server",
        connection.address,
        *["--n", "3", "--seed", "2", "--max-tokens", "6", "--ignore-eos"],
    )
    assert await asyncio.to_thread(main, said) == 0
    plain = capsys.readouterr().out
    assert await asyncio.to_thread(main, (*said, "--json", "--prompt-logprobs", "1")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert plain == "\n---\n".join(sample["text"] for sample in answer["samples"]) + "\n"
    assert answer["text"] == answer["samples"][0]["text"]
    assert [len(sample["token_ids"]) for sample in answer["samples"]] == [6, 6, 6]
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] - 1


async def test_one_sample_is_on_the_wire_as_ever_and_too_many_are_refused(connection):
    ids = baton_pb2.TokenIds(ids=PROMPT)
    sampling = baton_pb2.SamplingParams(seed=1, max_tokens=5, ignore_eos=True)
    async with grpc.aio.insecure_channel(connection.address) as channel:
        call = channel.unary_unary(
            "/baton.v1.Baton/GenerateOnce",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=baton_pb2.GenerateResponse.FromString,
        )
        plain = await call(baton_pb2.GenerateRequest(token_ids=ids, sampling=sampling))
        sampling.n = 1
        one = await call(baton_pb2.GenerateRequest(token_ids=ids, sampling=sampling))
    known = {"request_id", "text", "token_ids", "finish_reason", "usage", "timings"}
    assert {field.name for field, _ in plain.ListFields()} == {field.name for field, _ in one.ListFields()} == known
    assert plain.token_ids == one.token_ids
    async with AsyncBatonClient(connection) as client:
        for asked, why in (
            ({"n": 6}, "n is 6, at most 5 samples"),
            ({"n": 2**31 - 1}, "n is 2147483647, at most 5"),
            ({"n": 6, "temperature": 0.0}, "n is 6, at most 5 samples"),
        ):
            with pytest.raises(BatonClientError, match=why) as error:
                await anext(client.generate(token_ids=PROMPT, sampling=SamplingParams(**asked)))
            assert error.value.status is grpc.StatusCode.INVALID_ARGUMENT


async def test_greedy_samples_are_all_the_same_one_which_is_computed_once(connection):
    sampling = SamplingParams(temperature=0.0, n=3, max_tokens=6, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    async with AsyncBatonClient(connection) as client:
        chunks = [chunk async for chunk in client.generate(token_ids=PROMPT, sampling=sampling)]
        alone = await client.generate_once(token_ids=PROMPT, sampling=sampling, n=1)
        whole = await client.generate_once(token_ids=PROMPT, sampling=sampling)
    for index in range(3):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in own for token in chunk.token_ids] == list(alone.token_ids)
        assert own[-1].finish_reason is FinishReason.LENGTH
        assert whole.samples[index].logprobs == alone.logprobs
    assert [sample.index for sample in whole.samples] == [0, 1, 2]
    assert [bool(chunk.prompt_logprobs) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert whole.usage == chunks[-1].usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (45, 18)


async def test_each_sample_has_the_form_that_is_asked_for(connection):
    form = StructuredOutput.regex("[0-9]{3}-[a-d]{2,9}")
    sampling = SamplingParams(temperature=1.5, seed=2, n=3, max_tokens=40, structured_output=form)

    def whole():
        with BatonClient(connection) as client:
            return client.generate_once("a cat", sampling=sampling)

    samples = (await asyncio.to_thread(whole)).samples
    assert all(re.fullmatch("[0-9]{3}-[a-d]{2,9}", sample.text) for sample in samples)
    assert len({sample.text for sample in samples}) == 3
