"""The service's methods through a real server and the real clients."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import grpc
import pytest

from cluster.api import Explanation, ModelInfo, RequestReport, TokenChunk, Usage
from cluster.client.client import AsyncBatonClient, BatonClient, BatonClientError
from cluster.client.messages import GenerateChunk
from cluster.errors import NoWorkersError, QueueFullError, WorkerLostError
from protos import baton_pb2, baton_pb2_grpc
from workers.errors import (
    CapacityError,
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    RequestCancelledError,
)
from workers.messages import FinishReason, TokenLogprob, TokenOutput
from workers.sampling_params import SamplingParams

Serve = Callable[..., Awaitable]
Answer = Callable[..., list]


async def collect(client: AsyncBatonClient, *args, **kwargs) -> list[GenerateChunk]:
    return [chunk async for chunk in client.generate(*args, **kwargs)]


async def test_text_streams_and_the_last_message_says_how_it_went(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("hé llo", FinishReason.STOP))
    async with AsyncBatonClient(served.connection) as client:
        chunks = await collect(client, "ping", request_id="mine")
    assert "".join(chunk.text for chunk in chunks) == "hé llo"
    assert [i for chunk in chunks for i in chunk.token_ids] == [*served.tokenizer.encode("hé llo"), 256]
    assert all(chunk.finish_reason is None and chunk.usage is None for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.finish_reason is FinishReason.STOP
    assert last.usage == Usage(prompt_tokens=4, completion_tokens=8)
    assert last.report == RequestReport("p-1", "d-1", 0.01, 0.02, 0.035, 0.004, 0.001, 0.005, 4096, 1)
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert served.engine.requests[0].prompt_token_ids.tolist() == served.tokenizer.encode("ping")


async def test_tokens_are_sent_before_the_answer_is_complete(serve: Serve, answer: Answer) -> None:
    go_on = asyncio.Event()
    first, *rest = answer("ab")
    served = await serve([first, go_on, *rest])
    async with AsyncBatonClient(served.connection) as client:
        chunks = client.generate("x")
        assert (await anext(chunks)).text == "a"
        go_on.set()
        assert "".join([chunk.text async for chunk in chunks]) == "b"


async def test_sampling_arrives_as_given_and_completed(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("a"))
    given = SamplingParams(
        temperature=0.0, top_p=0.5, top_k=3, min_p=0.25, seed=2**64 - 1, presence_penalty=-1.5, frequency_penalty=0.5,
        repetition_penalty=1.25, stop=("x", "y"), stop_token_ids=(7,), ignore_eos=True, max_tokens=9, min_tokens=2,
        logprobs=0, include_stop_str_in_output=True, skip_special_tokens=False,
    )  # fmt: skip
    async with AsyncBatonClient(served.connection) as client:
        await collect(client, "ping", sampling=given)
        await collect(client, "ping", sampling=replace(given, max_tokens=1000))
        await collect(client, "ping")
    asked = [request.sampling for request in served.engine.requests]
    assert asked[0] == given
    assert asked[1] == replace(given, max_tokens=60)
    assert asked[2] == SamplingParams(max_tokens=60, seed=asked[2].seed)
    assert asked[2].seed is not None


async def test_what_a_request_leaves_open_is_the_checkpoints(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("a"), sampling_defaults={"temperature": 0.25, "max_tokens": 3})
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        generate = baton_pb2_grpc.BatonStub(channel).GenerateOnce
        await generate(baton_pb2.GenerateRequest(text="x"))
        await generate(baton_pb2.GenerateRequest(text="x", sampling={"temperature": 0, "max_tokens": 5}))
    asked = [request.sampling for request in served.engine.requests]
    assert [(sampling.temperature, sampling.max_tokens) for sampling in asked] == [(0.25, 3), (0.0, 5)]


async def test_what_ended_a_text_is_named(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("one END", FinishReason.STOP, chunk=8))
    async with AsyncBatonClient(served.connection) as client:
        for sampling, reason, text in (
            (SamplingParams(stop=("END",)), "END", "one "),
            (SamplingParams(stop=("END",), include_stop_str_in_output=True), "END", "one END"),
            (SamplingParams(stop_token_ids=(256,), ignore_eos=True), 256, "one END"),
            (SamplingParams(stop_token_ids=(256,)), None, "one END"),  # it is the end of a text in any case
            (SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False), None, "one END<eos>"),
        ):
            chunks = await collect(client, "x", sampling=sampling)
            assert ("".join(chunk.text for chunk in chunks), chunks[-1].stop_reason) == (text, reason)


async def test_a_template_is_told_what_the_client_says_and_special_tokens_are_its_choice(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(answer("a"))
    told, added = [], []
    monkeypatch.setattr(
        served.tokenizer, "apply_chat_template", lambda messages, variables, **_: told.append(variables) or "chat"
    )
    encode = served.tokenizer.encode
    monkeypatch.setattr(
        served.tokenizer, "encode", lambda text, **given: added.append(given["add_special_tokens"]) or encode(text)
    )
    chat = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"deep": {"n": 3, "share": 0.5}}}
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        stub = baton_pb2_grpc.BatonStub(channel)
        await stub.GenerateOnce(baton_pb2.GenerateRequest(chat=chat))
        await stub.GenerateOnce(baton_pb2.GenerateRequest(text="x"))
        await stub.GenerateOnce(baton_pb2.GenerateRequest(text="x", add_special_tokens=False))
        await stub.Tokenize(baton_pb2.TokenizeRequest(text="x", add_special_tokens=False))
    assert told == [{"deep": {"n": 3, "share": 0.5}}]
    assert type(told[0]["deep"]["n"]) is int
    assert added == [False, True, False, False]


async def test_token_ids_and_chat_are_prompts_too(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("a"))
    async with AsyncBatonClient(served.connection) as client:
        await collect(client, token_ids=[1, 2, 256])
        await collect(client, chat=[("system", "be brief"), ("user", "hi")])
    prompts = [tuple(request.prompt_token_ids) for request in served.engine.requests]
    assert prompts[0] == (1, 2, 256)
    assert served.tokenizer.decode(prompts[1]) == "[system]be brief[user]hi[assistant]"


async def test_log_probabilities_carry_their_tokens_text(serve: Serve) -> None:
    token = TokenOutput(
        "r", 65, -0.5, (TokenLogprob(65, -0.5), TokenLogprob(66, -1.5)), FinishReason.LENGTH, attempt_id="r"
    )
    served = await serve([TokenChunk((token,))])
    async with AsyncBatonClient(served.connection) as client:
        chunks = await collect(client, "x", sampling=SamplingParams(logprobs=2))
    (entry,) = chunks[0].logprobs
    text = served.tokenizer.decode
    assert (entry.chosen.token_id, entry.chosen.logprob, entry.chosen.text) == (65, -0.5, text([65]))
    assert [(top.token_id, top.logprob, top.text) for top in entry.top] == [
        (65, -0.5, text([65])),
        (66, -1.5, text([66])),
    ]


async def test_a_stop_string_ends_the_answer_and_closes_the_engine(serve: Serve, answer: Answer) -> None:
    never = asyncio.Event()
    served = await serve([*answer("one END two", chunk=8)[:1], never])
    async with AsyncBatonClient(served.connection) as client:
        chunks = await collect(client, "x", sampling=SamplingParams(stop=("END",)))
        await asyncio.wait_for(served.engine.closed.wait(), 5)
    assert "".join(chunk.text for chunk in chunks) == "one "
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].usage == Usage(1, 7)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 7


async def test_the_blocking_client_and_the_unary_methods(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("hello", chunk=2))

    def talk() -> None:
        with BatonClient(served.connection) as client:
            assert "".join(chunk.text for chunk in client.generate("x")) == "hello"
            whole = client.generate_once("x")
            assert (whole.text, whole.finish_reason, whole.usage) == ("hello", FinishReason.LENGTH, Usage(1, 5))
            assert whole.report is not None
            assert client.tokenize("abc") == served.tokenizer.encode("abc")
            chat = client.tokenize(chat=[("user", "hi")])
            assert served.tokenizer.decode(chat) == "[user]hi[assistant]"
            assert client.model_info() == ModelInfo("tiny", "llama", "float32", 64, 257, (256,), True)
            assert client.workers() == served.engine.workers()
            explanation = client.explain("abc", sampling=SamplingParams(max_tokens=99))
            asked = served.engine.requests[-1]
            assert asked.prompt_token_ids.tolist() == served.tokenizer.encode("abc")
            assert explanation == Explanation(3, 61, tuple(served.engine.explain(asked)))

    await asyncio.to_thread(talk)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"token_ids": baton_pb2.TokenIds()}, "the prompt is empty"),
        ({"chat": baton_pb2.ChatMessages()}, "chat messages is empty"),
        ({}, "no prompt: set one of text, token_ids, chat"),
        ({"text": "x" * 64}, "has 64 tokens; .* context window of 64"),
        ({"token_ids": baton_pb2.TokenIds(ids=[0] * 70)}, "has 70 tokens; .* context window of 64"),
        ({"token_ids": baton_pb2.TokenIds(ids=[1, 257, 300])}, "prompt token 257 is out of range: .* 257 tokens"),
        ({"token_ids": baton_pb2.TokenIds(ids=[2**32 - 1])}, "prompt token 4294967295 is out of range"),
        ({"text": "x", "model": "huge"}, "model 'huge' is not served here; this server serves 'tiny'"),
        ({"text": "x", "request_id": "r" * 129}, "request_id has 129 bytes, at most 128"),
        ({"text": "x" * 10_000_000}, "10000000 .* 64 tokens"),
        ({"token_ids": baton_pb2.TokenIds(ids=[1] * 2_000_000)}, "has 2000000 tokens; .* 64"),
        ({"text": "x", "sampling": {"temperature": -1}}, r"temperature is -1.0, it must be in \[0.0, 100.0\]"),
        ({"text": "x", "sampling": {"temperature": float("nan")}}, "temperature is nan"),
        ({"text": "x", "sampling": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"text": "x", "sampling": {"top_k": -(2**60)}}, "top_k is -"),
        ({"text": "x", "sampling": {"stop": [""]}}, "a stop string is empty"),
        ({"text": "x", "sampling": {"stop_token_ids": [257]}}, "stop token 257 is out of range"),
        ({"text": "x", "sampling": {"min_tokens": 64}}, "min_tokens is 64, .* has room for 63"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
async def test_bad_input_is_refused_with_value_and_limit(serve: Serve, method: str, fields: dict, message: str) -> None:
    served = await serve()
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        call = getattr(baton_pb2_grpc.BatonStub(channel), method)(baton_pb2.GenerateRequest(**fields))
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await call if method == "GenerateOnce" else await anext(aiter(call))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not served.engine.requests


@pytest.mark.parametrize("method", ["Generate", "GenerateOnce", "Tokenize"])
@pytest.mark.parametrize(
    "broken",
    [
        baton_pb2.GenerateRequest(text="QQ"),
        baton_pb2.GenerateRequest(chat={"messages": [{"role": "user", "content": "QQ"}]}),
        baton_pb2.GenerateRequest(model="QQ", text="x"),
    ],
)
async def test_malformed_utf8_is_an_invalid_argument(serve: Serve, method: str, broken) -> None:
    if method == "Tokenize":
        broken = baton_pb2.TokenizeRequest(text="QQ")
    raw = broken.SerializeToString().replace(b"QQ", b"\xff\xfe")
    served = await serve()
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        open_call = channel.unary_stream if method == "Generate" else channel.unary_unary
        call = open_call(f"/baton.v1.Baton/{method}")(raw)
        with pytest.raises(grpc.aio.AioRpcError, match="must be UTF-8") as caught:
            await anext(aiter(call)) if method == "Generate" else await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("why"), grpc.StatusCode.INVALID_ARGUMENT),
        (CapacityError("why"), grpc.StatusCode.INVALID_ARGUMENT),
        (QueueFullError("why"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlineExceededError("why"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (RequestCancelledError("why"), grpc.StatusCode.CANCELLED),
        (NoWorkersError("why"), grpc.StatusCode.UNAVAILABLE),
        (WorkerLostError("why"), grpc.StatusCode.UNAVAILABLE),
        (HandoffError("why"), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_an_error_of_the_engine_reaches_the_client_by_the_table(
    serve: Serve, answer: Answer, error: Exception, status: grpc.StatusCode
) -> None:
    served = await serve([answer("ab")[0], error])
    async with AsyncBatonClient(served.connection) as client:
        chunks = client.generate("x")
        assert (await anext(chunks)).text == "a"
        with pytest.raises(BatonClientError, match="why") as caught:
            await anext(chunks)
    assert caught.value.status is status


@pytest.mark.parametrize("script", [[RuntimeError("secret")], [TimeoutError("secret")], []])
async def test_a_defect_is_an_internal_error_that_tells_nothing(serve: Serve, script: list) -> None:
    """The last script ends without a finish reason: that must not look like a good answer."""
    served = await serve(script)
    async with AsyncBatonClient(served.connection) as client:
        with pytest.raises(BatonClientError, match="INTERNAL: internal error") as caught:
            await collect(client, "x")
    assert caught.value.status is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)


async def test_the_servers_own_deadline_ends_a_call_that_brings_none(serve: Serve, answer: Answer) -> None:
    served = await serve([answer("ab")[0], asyncio.Event()], default_timeout_s=0.2)
    async with AsyncBatonClient(served.connection) as client:
        with pytest.raises(BatonClientError, match=r"deadline of 0\.2 s") as caught:
            await collect(client, "x")
        await asyncio.wait_for(served.engine.closed.wait(), 5)
    assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < served.engine.requests[0].timeout_s <= 0.2


async def test_the_clients_deadline_governs_and_closes_the_engine(serve: Serve) -> None:
    served = await serve([asyncio.Event()], default_timeout_s=0.001)
    async with AsyncBatonClient(served.connection) as client:
        with pytest.raises(BatonClientError) as caught:
            await collect(client, "x", timeout_s=0.5)
        await asyncio.wait_for(served.engine.closed.wait(), 5)
    assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
    on_the_wire_s = 0.5 + 0.005  # gRPC rounds a deadline up to whole milliseconds on its way
    assert 0.001 < served.engine.requests[0].timeout_s <= on_the_wire_s


async def test_cancelling_closes_the_engine(serve: Serve, answer: Answer) -> None:
    served = await serve([answer("ab")[0], asyncio.Event()])
    async with AsyncBatonClient(served.connection) as client, aclosing(client.generate("x")) as chunks:
        await anext(chunks)
    await asyncio.wait_for(served.engine.closed.wait(), 5)


async def test_a_client_that_vanishes_before_the_first_token_closes_the_engine(serve: Serve) -> None:
    served = await serve([asyncio.Event()])
    client = AsyncBatonClient(served.connection)
    call = asyncio.create_task(collect(client, "x"))
    await asyncio.wait_for(served.engine.started.wait(), 5)
    await client.close()
    await asyncio.wait_for(served.engine.closed.wait(), 5)
    with pytest.raises((asyncio.CancelledError, BatonClientError)):
        await call


async def test_a_request_that_cannot_be_sent_is_refused_here(serve: Serve) -> None:
    served = await serve()
    async with AsyncBatonClient(served.connection) as client:
        for bad in (
            {"prompt": "\udc80"},
            {"token_ids": [-1]},
            {"token_ids": [2**32]},
            {},
            {"prompt": "a", "token_ids": [1]},
        ):
            with pytest.raises(InvalidRequestError):
                await collect(client, **bad)


async def test_a_full_service_says_when_to_try_again(serve: Serve) -> None:
    served = await serve([QueueFullError("no room", retry_after_s=2.5)])
    async with AsyncBatonClient(served.connection) as client:
        with pytest.raises(BatonClientError, match="RESOURCE_EXHAUSTED: no room") as caught:
            await collect(client, "x")
    assert caught.value.retry_after_s == 2.5


async def test_priority_and_user_reach_the_engine(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("a"))
    async with AsyncBatonClient(served.connection) as client:
        async for _ in client.generate("x", priority=-3, user="alice"):
            pass
        with pytest.raises(BatonClientError, match="user has 129 bytes, at most 128 are allowed"):
            await anext(aiter(client.generate("x", user="a" * 129)))
    assert [(request.priority, request.user) for request in served.engine.requests] == [(-3, "alice")]
