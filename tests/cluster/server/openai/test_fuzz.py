"""Whatever a client sends: an answer or a refusal with its reason, no error of the server, and nothing is left."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import grpc
import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.server.openai.requests.chat import ChatCompletionRequest
from cluster.server.openai.requests.completion import CompletionRequest
from cluster.server.openai.requests.response import ResponseRequest
from cluster.server.openai.requests.tokens import DetokenizeRequest, TokenizeRequest
from cluster.server.openai.requests.unsupported import UNSUPPORTED
from fuzzing import fuzzed
from made_messages import made, single
from protos import baton_pb2

pytestmark = pytest.mark.fuzz

FIELDS = sorted(
    {"role", "content", "type", "text", "nobody_knows_this"}.union(
        UNSUPPORTED,
        *(model.model_fields for model in (CompletionRequest, ChatCompletionRequest, ResponseRequest)),
        *(model.model_fields for model in (TokenizeRequest, DetokenizeRequest)),
    )
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
BASE = {
    "prompt": "ada 4127; ada?",
    "messages": [{"role": "user", "content": "ada 4127; ada?"}],
    "input": "ada 4127; ada?",
    "tokens": [5, 6, 7],
    "max_tokens": 2,
    "max_output_tokens": 2,
}
SAMPLING = baton_pb2.SamplingParams.DESCRIPTOR
METHODS = {
    "Generate": baton_pb2.GenerateRequest,
    "GenerateOnce": baton_pb2.GenerateRequest,
    "Tokenize": baton_pb2.TokenizeRequest,
    "Explain": baton_pb2.GenerateRequest,
    "Scale": baton_pb2.ScaleRequest,
    "ListWorkers": baton_pb2.ListWorkersRequest,
}
GOOD = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 3),
    st.floats(),
    st.sampled_from(["", "x", "auto", "none", "\ud800", "\x00", "a" * 200, "{{ 1 }}", "<|eos|>"]),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


class Errors(logging.Handler):
    """Keeps what the server says of defects of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture(scope="module")
def errors() -> Iterator[Errors]:
    handler = Errors()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="module")
def http(service, errors):
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def channel(service, errors):
    with grpc.insecure_channel(service.grpc.address) as channel:
        yield channel


def called(channel: grpc.Channel, method: str, raw: bytes) -> tuple[grpc.StatusCode, str]:
    """How a call ends whose request is these bytes."""
    path = f"/baton.v1.Baton/{method}"
    try:
        if method == "Generate":
            list(channel.unary_stream(path)(raw, timeout=60))
        else:
            channel.unary_unary(path)(raw, timeout=60)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@fuzzed(40)
@example("/v1/completions", {"seed": 2**70})
@given(path=st.sampled_from(PATHS), odd=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_odd_bodies_are_answered_or_refused(http: httpx2.Client, path: str, odd: dict) -> None:
    body = {**BASE, **odd}
    if path != "/tokenize":
        body = {name: value for name, value in body.items() if name in odd or name != "messages" or "chat" in path}
    got = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert got.status_code in (200, 400, 404), (path, odd, got.text)
    if got.status_code != 200:
        assert got.json()["error"]["message"]
    elif "text/event-stream" in got.headers["content-type"]:
        assert "internal error" not in got.text
    else:
        got.json()


@fuzzed(50)
@given(st.data(), st.sampled_from(sorted(METHODS)))
def test_odd_messages_are_answered_or_refused(channel: grpc.Channel, data: st.DataObject, method: str) -> None:
    message_type = METHODS[method]
    fields = data.draw(made(message_type.DESCRIPTOR))
    if message_type is baton_pb2.GenerateRequest:
        if not {"text", "token_ids", "chat"} & set(fields) or data.draw(st.booleans()):
            fields["text"] = "ada 4127; ada?"
        sampling = fields.setdefault("sampling", {})
        if 2 < sampling.get("max_tokens", 3) < 2**31:
            sampling["max_tokens"] = 2
    raw = message_type(**fields).SerializeToString()
    if data.draw(st.integers(0, 3)) == 0:
        place = data.draw(st.integers(0, len(raw)))
        raw = raw[:place] + data.draw(st.binary(max_size=6)) + raw[place + data.draw(st.integers(0, 3)) :]
    status, details = called(channel, method, raw)
    assert status in GOOD or (status, details) == (grpc.StatusCode.NOT_FOUND, ""), (status, details)
    assert details or status is grpc.StatusCode.OK


NUMBERS = [field.name for field in SAMPLING.fields if not field.is_repeated and field.message_type is None]


@fuzzed(60)
@example("top_k", -(2**63))
@example("temperature", float("nan"))
@example("seed", 2**64 - 1)
@given(st.sampled_from(NUMBERS), st.data())
def test_a_number_out_of_range_is_refused_with_its_name_and_the_limits(
    channel: grpc.Channel, name: str, data: st.DataObject | float
) -> None:
    value = data.draw(single(SAMPLING.fields_by_name[name])) if isinstance(data, st.DataObject) else data
    sampling = {"max_tokens": 2, name: value}
    if 2 < sampling["max_tokens"] < 2**31:
        return
    raw = baton_pb2.GenerateRequest(text="ada 4127; ada?", sampling=sampling).SerializeToString()
    status, details = called(channel, "GenerateOnce", raw)
    assert status in GOOD, details
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        assert name in details
        assert f"{value}" in details


@fuzzed(40)
@example(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}")
@example(b'{"prompt": "x", "max_tokens": 1e999}')
@example(b'{"prompt": ' + b"[" * 100_000 + b"}")
@example(b'{"prompt": "\\ud800"}')
@example(b'{"prompt": "x", "prompt": NaN}')
@example(b"\xff\xfe")
@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda body, place, junk, cut: body[:place] + junk + body[place + cut :],
            st.sampled_from([json.dumps({**BASE, "stream": stream}).encode() for stream in (True, False)]),
            st.integers(0, 150),
            st.one_of(st.binary(max_size=5), st.sampled_from([b"NaN", b"-Infinity", b"1e999", b"\\ud800", b'{"a":'])),
            st.integers(0, 5),
        ),
    )
)
def test_bytes_that_are_no_request_are_refused(http: httpx2.Client, body: bytes) -> None:
    for path in PATHS[:3]:
        got = http.post(path, content=body, headers={"content-type": "application/json"})
        assert got.status_code in (200, 400, 404, 415), (body, got.text)
        assert "internal error" not in got.text
        assert len(got.content) < 20_000


def test_the_service_is_well_after_all_of_it(client, service, errors) -> None:
    answer = client.completions.create(model="recall", prompt="ada 4127, bob 9083; bob?", temperature=0)
    assert answer.choices[0].text == " 9083"
    service.until_idle()
    assert not errors.texts
