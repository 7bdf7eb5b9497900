"""Large requests are parsed, checked and built off the event loop, by both doors."""

from __future__ import annotations

import threading
from collections.abc import Callable

import httpx2

from cluster.client.client import AsyncBatonClient
from cluster.generation.intake import AT_ONCE_BYTES
from cluster.server.grpc import service
from cluster.server.openai import bounded_route


def recorded(monkeypatch, module, name: str) -> list[bool]:
    """For each call of a function, whether a thread for such work makes it."""
    function, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(threading.current_thread().name.startswith("intake"))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


async def test_bodies(serve_http, answer: Callable, monkeypatch) -> None:
    calls = recorded(monkeypatch, bounded_route, "check_json_bounds")
    served = await serve_http(answer("ab"))
    pad = "y" * (AT_ONCE_BYTES + 1)
    async with httpx2.AsyncClient(base_url=served.server.url, timeout=60) as client:
        for path, body in (
            ("/v1/completions", {"prompt": "x", "user": "u"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/responses", {"input": "x"}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [120]}),
        ):
            small = await client.post(path, json=body)
            large = await client.post(path, json={**body, "unknown": pad})
            assert (small.status_code, large.status_code) == (200, 200), large.text
            wrong = await client.post(path, json={"unknown": pad})
            assert wrong.status_code == 400
            assert "is missing" in wrong.json()["error"]["message"]
        broken = await client.post(
            "/v1/completions", content=b'{"prompt": "' + pad.encode(), headers={"content-type": "application/json"}
        )
        assert broken.json()["error"]["code"] == "invalid_json"
    assert calls == [True, True] * 5 + [True]


async def test_messages(serve: Callable, answer: Callable, monkeypatch) -> None:
    parsed, built = recorded(monkeypatch, service, "check_bounds"), recorded(monkeypatch, service, "prompt_from_proto")
    served = await serve(answer("a"))
    async with AsyncBatonClient(served.connection) as client:
        await client.generate_once("x", stop=["a" * 10])
        await client.generate_once("x", stop=["a" * 100] * 10, bad_words=["b" * 60] * 60)
    assert parsed == built == [False, True]
