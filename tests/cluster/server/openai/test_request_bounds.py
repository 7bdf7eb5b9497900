"""Requests that are small on the wire and large when they are there: refused by both doors before they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import httpx2
import openai
import pytest

from cluster.conversation.messages import MAX_MESSAGES
from cluster.generation.whole_answer import MAX_ANSWER_LOGPROBS, bounded_answer
from cluster.server.error_text import MAX_CHARACTERS, error_text
from cluster.server.grpc.errors import status_of
from cluster.server.grpc.serve import MAX_REQUEST_BYTES
from cluster.server.openai import errors as openai_errors
from protos import baton_pb2
from workers.errors import InvalidRequestError, SamplingError
from workers.sampling_params import MAX_BAD_WORDS_BYTES, MAX_STOP_BYTES, MAX_STOP_TOKEN_IDS, SamplingParams

MANY = 2_000_000
EMPTY_MESSAGE = b"\x0a\x00"  # 2 bytes, and a message when it is parsed


def chat_of_empty_messages(count: int) -> bytes:
    inner = EMPTY_MESSAGE * count
    return b"\x2a" + _varint(len(inner)) + inner


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


async def test_a_chat_of_millions_of_empty_messages_is_never_parsed(serve: Callable) -> None:
    served = await serve([])
    raw = chat_of_empty_messages(MANY)
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        for method in ("Generate", "GenerateOnce", "Tokenize", "Explain"):
            kind = channel.unary_stream if method == "Generate" else channel.unary_unary
            content = raw if method != "Tokenize" else b"\x1a" + raw[1:]
            call = kind(f"/baton.v1.Baton/{method}")(content)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if method == "Generate" else call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (
                f"has {MAX_MESSAGES + 1} entries or more, at most {MAX_MESSAGES} are allowed" in caught.value.details()
            )
        with pytest.raises(grpc.aio.AioRpcError, match=r"RESOURCE_EXHAUSTED") as caught:
            await channel.unary_unary("/baton.v1.Baton/GenerateOnce")(
                b"\x1a" + _varint(MAX_REQUEST_BYTES) + b"x" * MAX_REQUEST_BYTES
            )
        assert str(MAX_REQUEST_BYTES) in caught.value.details()
        # as many as are allowed are parsed and written out
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/baton.v1.Baton/GenerateOnce")(chat_of_empty_messages(MAX_MESSAGES))
        assert "context window of 64 tokens" in caught.value.details()


BODIES = [
    ("chat/completions", b'{"messages": [' + b"{}," * MANY + b"{}]}", "lists and objects, at most 65536"),
    (
        "chat/completions",
        b'{"messages": [' + b'{"role":"u","content":""},' * MAX_MESSAGES + b'{"role":"u","content":""}]}',
        f"messages is a list of {MAX_MESSAGES + 1}: list should have at most {MAX_MESSAGES} items",
    ),
    (
        "responses",
        b'{"input": [' + b"{}," * MAX_MESSAGES + b"{}]}",
        f"input has {MAX_MESSAGES + 1} entries, at most {MAX_MESSAGES} are",
    ),
    ("completions", b'{"prompt": [' + b"1," * 3_000_000 + b"1]}", "values, at most 2097152"),
    (
        "completions",
        b'{"prompt": "x", "stop": "' + b"x" * (MAX_STOP_BYTES + 1) + b'"}',
        f"stop has {MAX_STOP_BYTES + 1} bytes in all, at most {MAX_STOP_BYTES}",
    ),
    (
        "completions",
        b'{"prompt": "x", "stop_token_ids": [' + b"1," * MAX_STOP_TOKEN_IDS + b"1]}",
        f"at most {MAX_STOP_TOKEN_IDS} items",
    ),
    ("completions", b'{"prompt": "x", "bad_words": ["' + b"x" * 65537 + b'"]}', f"at most {MAX_BAD_WORDS_BYTES}"),
]


async def test_bodies_that_have_too_much_are_refused_with_the_bound(serve_http) -> None:
    served = await serve_http()
    async with httpx2.AsyncClient(base_url=f"{served.server.url}/v1", timeout=60) as client:
        for path, body, message in BODIES:
            answer = await client.post(f"/{path}", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, path
            assert message in answer.json()["error"]["message"]
    assert not served.engine.requests


def test_log_probabilities_in_one_piece_are_bounded() -> None:
    asked = SamplingParams(logprobs=20, max_tokens=20_000)
    with pytest.raises(InvalidRequestError, match=rf"max_tokens is 20000 .* 420000 .* at most {MAX_ANSWER_LOGPROBS}"):
        bounded_answer(asked, 100_000, 1)
    assert bounded_answer(asked, 10_000, 1) == asked  # the window ends it before
    with pytest.raises(InvalidRequestError, match="in 2 answers"):
        bounded_answer(asked, 10_000, 2)
    left_open = bounded_answer(SamplingParams(logprobs=20), 100_000, 1)
    assert left_open.max_tokens == MAX_ANSWER_LOGPROBS // 21
    assert bounded_answer(SamplingParams(max_tokens=90_000), 100_000, 1).max_tokens == 90_000


async def test_only_what_is_sent_in_one_piece_is_bounded_by_it(serve: Callable, answer: Callable, monkeypatch) -> None:
    monkeypatch.setattr("cluster.generation.whole_answer.MAX_ANSWER_LOGPROBS", 40)
    served = await serve(answer("a"))
    request = baton_pb2.GenerateRequest(text="x", sampling=baton_pb2.SamplingParams(logprobs=1, max_tokens=21))
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="stream the answer, or ask for less"):
            await channel.unary_unary("/baton.v1.Baton/GenerateOnce")(request.SerializeToString())
        assert await channel.unary_stream("/baton.v1.Baton/Generate")(request.SerializeToString()).read()


def test_an_error_does_not_repeat_all_that_a_client_has_sent() -> None:
    error = InvalidRequestError("x" * 10**6)
    assert len(error_text(error)) == MAX_CHARACTERS + 1
    assert status_of(error)[1] == openai_errors.answer_of(error).message == error_text(error)


def test_logits_from_which_no_token_can_be_chosen_are_no_defect_of_the_server(caplog) -> None:
    error = SamplingError("the logits of request r have no valid token")
    assert status_of(error) == (grpc.StatusCode.FAILED_PRECONDITION, str(error))
    assert openai_errors.answer_of(error).kind.status == 422
    assert not caplog.records


async def test_fields_that_nobody_knows_are_ignored_up_to_a_number(serve_http, answer) -> None:
    served = await serve_http(answer("a"))
    async with served.client() as client:
        few, many = ({f"nobody_knows_{i}": i for i in range(count)} for count in (256, 257))
        await client.completions.create(model="tiny", prompt="x", extra_body=few)
        with pytest.raises(openai.BadRequestError, match="257 fields that are not known, at most 256 are ignored"):
            await client.completions.create(model="tiny", prompt="x", extra_body=many)


async def test_the_head_of_a_request_and_the_chunks_of_a_body_are_bounded(serve_http, answer) -> None:
    served = await serve_http(answer("a"))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    body = b'{"prompt": "x", "max_tokens": 1}'.ljust(5000)
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    pieces = b"".join(b"%x\r\n%s\r\n" % (500, body[at : at + 500]) for at in range(0, 5000, 500)) + b"0\r\n\r\n"
    chunked = head + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    for sent, status, text in (
        (head + b"".join(b"x-%d: y\r\n" % number for number in range(8000)), b"400", b"more than 65536 bytes"),
        (chunked + crumbs, b"400", b"more than 4096 chunks of few bytes"),
        (chunked + pieces, b"200", b"text_completion"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(sent)
        async with asyncio.timeout(30):
            got = await reader.read()
        assert got.startswith(b"HTTP/1.1 " + status), got
        assert text in got
        writer.close()


async def test_numbers_for_a_template_are_finite(serve) -> None:
    served = await serve()
    chat = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": float("nan")}}
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        call = channel.unary_unary("/baton.v1.Baton/GenerateOnce")
        with pytest.raises(grpc.aio.AioRpcError, match=r"chat_template_kwargs is no JSON object: .*NaN") as refused:
            await call(baton_pb2.GenerateRequest(chat=chat).SerializeToString())
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
