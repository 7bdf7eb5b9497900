"""Whose call it is, at both doors: credentials say on whose account, which priorities, and whose prompts are shared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import openai
import pytest

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.routing.prefix_index import PromptPrefix
from workers.token_ids import as_token_ids

FILE = """
generate tenant=acme share=2 acme-1
generate tenant=acme priority=0:10 acme-2
generate tenant=beta beta-1
generate nobody-1
operate,generate ops
"""
PROMPT = "the same prompt, whoever asks"


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text(FILE)
    return str(path)


async def test_over_grpc(serve: Callable, answer: Callable, tokens: str) -> None:
    served = await serve(answer("a"), auth_token_file=tokens)

    async def ask(token: str, **options) -> None:
        async with AsyncBatonClient(Connection(served.connection.address, token=token)) as client:
            await client.generate_once(PROMPT, **options)

    await ask("acme-1")
    await ask("beta-1")
    await ask("acme-2", priority=10)
    await ask("ops", priority=-7)
    await ask("nobody-1")
    callers = [request.caller for request in served.engine.requests]
    assert [caller.tenant.name for caller in callers] == ["acme", "beta", "acme", "", ""]
    assert [caller.client for caller in callers][:3] == ["tenant acme", "tenant beta", "tenant acme"]
    assert callers[0].share == 2.0
    assert all("127.0.0.1" in caller.host for caller in callers)
    owners = [request.cache_owner for request in served.engine.requests]
    assert owners == [caller.client for caller in callers], "whose blocks they are in prefix caches"
    salts = [request.cache_salt for request in served.engine.requests]
    assert salts[0] == salts[2] != salts[1]
    assert salts[3] == salts[4] == b""
    hashes = [PromptPrefix(as_token_ids([1] * 17), salt).hashes(16) for salt in salts[:3]]
    assert hashes[0] == hashes[2] != hashes[1], "what a cache has of one tenant's prompt no other finds"
    for token, priority, allowed in (("acme-1", -1, r"\[0, 2147483647\]"), ("acme-2", 11, r"\[0, 10\]")):
        with pytest.raises(BatonClientError, match=f"priority is {priority}, with these credentials .*{allowed}") as no:
            await ask(token, priority=priority)
        assert no.value.status is grpc.StatusCode.INVALID_ARGUMENT


async def test_over_http(serve_http, answer: Callable, tokens: str) -> None:
    served = await serve_http(answer("a"), server={"auth_token_file": tokens})

    async def ask(token: str, **extra) -> None:
        async with served.client(api_key=token) as client:
            await client.completions.create(model="tiny", prompt=PROMPT, extra_body=extra)

    await asyncio.gather(ask("acme-1", cache_salt="s"), ask("beta-1", cache_salt="s"))
    by_tenant = {request.caller.tenant.name: request for request in served.engine.requests}
    assert by_tenant.keys() == {"acme", "beta"}
    assert by_tenant["acme"].cache_salt != by_tenant["beta"].cache_salt
    with pytest.raises(openai.BadRequestError, match="priority is -1, with these credentials"):
        await ask("beta-1", priority=-1)


async def test_no_salt_that_a_client_gives_is_another_tenants(serve_http, answer: Callable, tokens: str) -> None:
    served = await serve_http(answer("a"), server={"auth_token_file": tokens})
    async with served.client(api_key="acme-1") as client:
        await client.completions.create(model="tiny", prompt=PROMPT)
    (salt,) = (request.cache_salt for request in served.engine.requests)
    with pytest.raises(UnicodeDecodeError):
        salt.decode()
