"""What goes wrong, as clients of OpenAI's interface see it."""

import asyncio
import json

import httpx2
import openai
import pytest

from cluster.errors import NoWorkersError, QueueFullError, WorkerLostError
from workers.errors import (
    CapacityError,
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    RequestCancelledError,
)

ASK = {"model": "tiny", "prompt": "x"}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("why"), 400, None),
        (CapacityError("why"), 400, None),
        (QueueFullError("why", 2.5), 429, "rate_limit_exceeded"),
        (DeadlineExceededError("why"), 408, "deadline_exceeded"),
        (NoWorkersError("why"), 503, "service_unavailable"),
        (WorkerLostError("why"), 503, "service_unavailable"),
        (HandoffError("why"), 503, "service_unavailable"),
        (RuntimeError("secret"), 500, "internal_error"),
        (TimeoutError("secret"), 500, "internal_error"),
    ],
)
async def test_an_error_has_its_status_before_and_its_event_after_the_first_token(
    serve_http, answer, error: Exception, status: int, code: str | None
) -> None:
    at_once, later = await serve_http([error]), await serve_http([answer("ab")[0], error])
    expected = "internal error" if status == 500 else "why"
    for stream in (False, True):
        async with at_once.client() as client:
            with pytest.raises(openai.APIStatusError, match=expected) as caught:
                await client.completions.create(**ASK, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert "secret" not in str(caught.value)
        if status == 429:
            assert caught.value.response.headers["retry-after"] == "3"
            assert caught.value.response.headers["retry-after-ms"] == "2500"
    async with later.client() as client:
        parts = await client.completions.create(**ASK, stream=True)
        assert (await anext(parts)).choices[0].text == "a"
        with pytest.raises(openai.APIError, match=expected) as failed:
            await anext(parts)
    assert failed.value.code == code
    async with later.client() as client:
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(**ASK)  # half an answer is none


async def test_an_answer_without_its_end_is_no_answer(serve_http, answer) -> None:
    served = await serve_http(answer("ab")[:1])
    async with served.client() as client:
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(**ASK)
        parts = [part async for part in await client.responses.create(model="tiny", input="x", stream=True)]
    assert (parts[-1].type, parts[-1].code) == ("error", "internal_error")


BAD = [
    ("completions", {"prompt": ""}, 400, "the prompt is empty"),
    ("completions", {"prompt": []}, 400, r"prompt is \[\]"),
    ("completions", {}, 400, "prompt is missing"),
    ("completions", {"prompt": ["a", 1]}, 400, "prompt is a list of 2"),
    ("completions", {"prompt": [1, 2**40]}, 400, "1099511627776 is out of range"),
    ("completions", {"prompt": [1, 257]}, 400, "prompt token 257 is out of range: .* 257 tokens"),
    ("completions", {"prompt": "x" * 64}, 400, "has 64 tokens; .* context window of 64"),
    ("completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("completions", {"prompt": "x", "model": "huge"}, 404, "model 'huge' is not served here"),
    ("completions", {"prompt": "x", "temperature": -1}, 400, r"temperature is -1.0, it must be in \[0.0, 100.0\]"),
    ("completions", {"prompt": "x", "temperature": "0.5"}, 400, "temperature is '0.5': input should be a valid num"),
    ("completions", {"prompt": "x", "max_tokens": True}, 400, "max_tokens is True: input should be a valid integer"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
    ("completions", {"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens is"),
    ("completions", {"prompt": "x", "n": 0}, 400, "n is 0: input should be greater than or equal to 1"),
    ("completions", {"prompt": ["x"] * 20, "n": 100}, 400, "20 prompts with n 100 are 2000 answers, at most 1024"),
    ("completions", {"prompt": "x", "best_of": 2}, 400, "best_of is 2, which is not supported"),
    ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported by this server"),
    ("completions", {"prompt": "x", "stop": [""]}, 400, "a stop string is empty"),
    ("completions", {"prompt": "x", "stop": {"a": 1}}, 400, "stop is an object of 1"),
    ("completions", {"prompt": "x", "stop_token_ids": [257]}, 400, "stop token 257 is out of range"),
    ("completions", {"prompt": "x", "stream": False, "stream_options": {}}, 400, "stream_options are given without"),
    ("completions", {"prompt": "x", "n": 65}, 400, "n is 65, at most 64 samples"),
    ("completions", {"prompt": "x", "user": "u" * 129}, 400, "user has 129 bytes, at most 128"),
    ("completions", {"prompt": "x", "priority": 2**31}, 400, "priority is 2147483648"),
    ("chat/completions", {"messages": []}, 400, "chat messages is empty"),
    ("chat/completions", {"messages": [{"content": "x"}]}, 400, r"messages\[0\].role is missing"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, r"messages\[0\] has no content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        r"messages\[0\].content\[0\] is of type 'image_url'",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
        400,
        "top_logprobs is given without logprobs=true",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 2},
        400,
        "max_tokens is 1 and max_completion_tokens 2",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{1}}"}},
        400,
        "chat_template_kwargs has chat_template",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        400,
        r"tools\[0\].function is missing",
    ),
    ("completions", {"prompt": "x", "tools": [{"type": "function"}]}, 400, "tools is not supported by this server"),
    ("responses", {"input": [{"type": "reasoning"}]}, 400, r"input\[0\] is of type 'reasoning'"),
    ("responses", {"input": "x", "previous_response_id": "r"}, 400, "previous_response_id is not supported"),
    ("nothing", {}, 404, "POST /v1/nothing: not found"),
]


async def test_bad_input_is_refused_with_its_name_value_and_limit(serve_http) -> None:
    served = await serve_http()
    async with served.client() as client:
        for path, body, status, message in BAD:
            for stream in (False, True):
                content = json.dumps({"stream": stream, **body}).encode()
                with pytest.raises(openai.APIStatusError, match=message) as caught:
                    await client.post(f"/{path}", content=content, cast_to=object)
                assert caught.value.status_code == status
                assert caught.value.body["type"] == "invalid_request_error"
    assert not served.engine.requests


async def test_values_that_ask_for_nothing_are_no_reason_to_refuse(serve_http, answer, caplog) -> None:
    served = await serve_http(answer("ok"))
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "best_of": 1,
        "suffix": None,
        "temperature": None,
        "stop": None,
        "stream_options": None,
        "metadata": {"a": "b"},
        "no_such_field": [1],
    }
    async with served.client() as client:
        for _ in range(2):
            body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **nothing}
            answered = await client.post("/chat/completions", body=body, cast_to=object)
            assert answered["choices"][0]["message"]["content"] == "ok"
    assert [record.message for record in caplog.records].count(
        "requests have a field 'no_such_field', which is ignored"
    ) == 1


BODIES = [
    (b"{", "application/json", 400, "the body is no valid JSON"),
    (b"[" * 60_000, "application/json", 400, "error parsing the body"),
    (b'{"prompt": "\xff"}', "application/json", 400, "error parsing the body"),
    (b"[1]", "application/json", 4, ""),
    (b"null", "application/json", 4, ""),
    (b"", "application/json", 4, ""),
    (b'{"prompt": 1' + b"0" * 5000 + b"}", "application/json", 400, ""),
    (b'{"prompt": "x"}', "text/plain", 415, "sent as application/json"),
    (b"prompt=x", "application/x-www-form-urlencoded", 415, "sent as application/json"),
    (b'{"prompt": "' + b"x" * 2_000_000 + b'"}', "application/json", 413, "more than the 1000000 bytes"),
]


async def test_a_body_that_is_no_request_is_never_the_servers_fault(serve_http) -> None:
    served = await serve_http(max_body_mb=1.0)

    async def in_pieces(content: bytes):
        for at in range(0, len(content), 65_536):
            yield content[at : at + 65_536]

    async with httpx2.AsyncClient(base_url=served.server.url) as client:
        for content, kind, status, message in BODIES:
            for sent in (content, in_pieces(content)):
                got = await client.post("/v1/completions", content=sent, headers={"content-type": kind})
                assert status in (got.status_code, got.status_code // 100), content[:40]
                assert message in got.json()["error"]["message"]


async def test_a_client_that_goes_away_cancels(serve_http, answer) -> None:
    for stream in (True, False):
        served = await serve_http([answer("ab")[0], asyncio.Event()])
        async with served.client() as client:
            call = asyncio.create_task(client.completions.create(**ASK, stream=stream))
            await asyncio.wait_for(served.engine.started.wait(), 5)
            if stream:
                await (await call).close()
            else:
                call.cancel()
            await asyncio.wait_for(served.engine.closed.wait(), 5)
        assert served.server.num_calls == 0


async def test_one_answer_that_fails_cancels_the_others(serve_http, answer) -> None:
    served = await serve_http([answer("ab")[0], RequestCancelledError("no more")])
    async with served.client() as client:
        with pytest.raises(openai.APIError):
            [part async for part in await client.completions.create(**ASK, n=3, stream=True)]
    await asyncio.wait_for(served.engine.closed.wait(), 5)
    assert served.server.num_calls == 0


async def test_the_servers_deadline_ends_a_call(serve_http, answer) -> None:
    served = await serve_http([answer("ab")[0], asyncio.Event()], server={"default_timeout_s": 0.2})
    async with served.client() as client:
        with pytest.raises(openai.APIStatusError, match=r"deadline of 0\.2 s") as caught:
            await client.completions.create(**ASK)
    assert caught.value.status_code == 408
    await asyncio.wait_for(served.engine.closed.wait(), 5)
