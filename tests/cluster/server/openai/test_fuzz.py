"""Whatever a client sends: an answer or a refusal with its reason, never an error of the server."""

from __future__ import annotations

import json

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.server.openai.requests.chat import ChatCompletionRequest
from cluster.server.openai.requests.completion import CompletionRequest
from cluster.server.openai.requests.response import ResponseRequest
from cluster.server.openai.requests.tokens import DetokenizeRequest, TokenizeRequest
from cluster.server.openai.requests.unsupported import UNSUPPORTED

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


@pytest.fixture(scope="module")
def http(service):
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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


def test_the_service_is_well_after_all_of_it(client, service) -> None:
    answer = client.completions.create(model="recall", prompt="ada 4127, bob 9083; bob?", temperature=0)
    assert answer.choices[0].text == " 9083"
    service.until_idle()
