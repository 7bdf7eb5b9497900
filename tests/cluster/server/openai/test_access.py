"""Who can reach the HTTP server, and how: keys, TLS, origins, and how it starts and stops."""

import asyncio
import ssl
import subprocess
from pathlib import Path

import httpx2
import openai
import pytest

from cluster.config.load import load_config
from cluster.gateway.readiness import Health
from cluster.server import reloaded
from cluster.server.doors import Doors, check_doors
from cluster.server.openai.serve import HttpServer
from workers.errors import ConfigError

ASK = {"model": "tiny", "prompt": "x"}


def config_of(**overrides: object):
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(environ={}, overrides={"server.port": 0, **given}).server


async def test_without_a_right_key_nothing_but_health_is_answered(serve_http, answer) -> None:
    served = await serve_http(answer("ok"), api_keys=("first", "second"))
    async with served.client(api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="wrong API key") as caught:
            await client.completions.create(**ASK)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            await client.models.list()
    assert not served.engine.requests
    for key in ("first", "second"):
        async with served.client(api_key=key) as client:
            assert (await client.completions.create(**ASK)).choices[0].text == "ok"
    async with httpx2.AsyncClient(base_url=served.server.url) as client:
        assert [(await client.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]
        for path in ("/version", "/v1/models", "/openapi.json", "/nothing"):
            got = await client.get(path)
            assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer")
            assert "carries no API key" in got.json()["error"]["message"]


async def test_the_keys_are_those_of_the_other_door_unless_it_has_its_own(serve_http, answer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    served = await serve_http(answer("ok"), server={"auth_token_file": str(file)})
    async with served.client(api_key="s3cret") as client:
        await client.models.list()
    async with served.client(api_key="other") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    file.write_text("generate asks\noperate looks\n")
    served = await serve_http(answer("ok"), server={"auth_token_file": str(file)})
    async with served.client(api_key="asks") as client:
        await client.models.list()
    async with served.client(api_key="looks") as client:
        with pytest.raises(openai.PermissionDeniedError, match="it needs the role generate"):
            await client.models.list()
    own = config_of(server__auth_token="a", server__http__api_keys="b,c")
    assert own.http.api_keys == ("b", "c")


def test_tls_is_that_of_the_other_door_unless_it_has_its_own() -> None:
    tls = {"server__tls_cert": "c", "server__tls_key": "k", "server__tls_client_ca": "ca"}
    http = config_of(**tls).http
    assert (http.tls_cert, http.tls_key, http.tls_client_ca) == ("c", "k", "ca")
    http = config_of(**tls, server__http__tls_cert="c2", server__http__tls_key="k2").http
    assert (http.tls_cert, http.tls_key, http.tls_client_ca) == ("c2", "k2", None)
    with pytest.raises(ConfigError, match=r"server\.http\.tls_key is not set"):
        config_of(server__http__tls_cert="c")
    with pytest.raises(ConfigError, match=r"server\.http\.tls_client_ca is set without"):
        config_of(server__http__tls_client_ca="ca")


def _certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


async def test_tls(serve_http, answer, tmp_path: Path) -> None:
    cert, key = _certificate(tmp_path)
    served = await serve_http(answer("ok"), tls_cert=str(cert), tls_key=str(key))
    assert served.server.url.startswith("https://")
    async with httpx2.AsyncClient(verify=ssl.create_default_context(cafile=cert)) as client:
        got = await client.post(f"{served.server.url}/v1/completions", json=ASK)
    assert got.json()["choices"][0]["text"] == "ok"


async def test_a_certificate_that_is_replaced_is_shown_to_the_next_connection(
    serve_http, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloaded, "LOOK_INTERVAL_S", 0.0)
    cert, key = _certificate(tmp_path)
    served = await serve_http(tls_cert=str(cert), tls_key=str(key))
    where = ("127.0.0.1", served.server.port)
    before = cert.read_text()
    assert await asyncio.to_thread(ssl.get_server_certificate, where) == before
    _certificate(tmp_path)
    after = await asyncio.to_thread(ssl.get_server_certificate, where)
    assert after == cert.read_text() != before


async def test_what_is_wrong_with_the_address_is_found_early(serve_http, tmp_path: Path) -> None:
    served = await serve_http()
    taken = config_of(server__http__port=served.server.port)
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: address already in use.*--http-port"):
        await check_doors(taken)
    doors = Doors(taken)
    with pytest.raises(ConfigError, match="address already in use"):
        await doors.open()
    with pytest.raises(ConfigError, match=r"cannot read server\.http\.tls_cert"):
        await check_doors(config_of(server__http__tls_cert="no", server__http__tls_key="no"))
    with pytest.raises(ConfigError, match="bearer token"):
        await check_doors(config_of(server__http__api_keys="päss"))
    with pytest.raises(ConfigError, match=r"server\.port and server\.http\.port are both 8000"):
        config_of(server__port=8000)
    assert config_of(server__port=8000, server__http__enabled=False).http.enabled is False


async def test_a_user_who_listens_beyond_this_machine_is_told() -> None:
    told = await check_doors(config_of(server__http__host="0.0.0.0"))
    assert len(told) == 2
    assert "anyone who can reach 0.0.0.0:0 can use the service by HTTP" in told[0]
    assert "unencrypted" in told[1]
    assert await check_doors(config_of()) == []


@pytest.mark.parametrize(("origins", "allowed"), [(None, None), (("https://chat.example",), "https://chat.example")])
async def test_web_pages_may_call_only_if_that_is_wanted(serve_http, origins, allowed) -> None:
    served = await serve_http(**({} if origins is None else {"cors_origins": origins}))
    ask = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    async with httpx2.AsyncClient(base_url=served.server.url) as client:
        got = await client.options("/v1/completions", headers=ask)
    assert got.headers.get("access-control-allow-origin") == allowed


async def test_before_it_serves_it_says_what_the_start_is_at() -> None:
    server = HttpServer(config_of())
    await server.open()
    await server.starting("loading a model")
    async with httpx2.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/health")).status_code == 200
        ready, ask = await client.get("/ready"), await client.post("/v1/completions", json=ASK)
    await server.stop(grace_s=0)
    assert (ready.status_code, ready.json()["reason"]) == (503, "the service is starting: loading a model")
    assert (ask.status_code, ask.headers["retry-after"]) == (503, "1")
    assert "the service is starting: loading a model" in ask.json()["error"]["message"]


async def test_readiness_follows_what_is_reported(serve_http) -> None:
    served = await serve_http()
    await served.server.report(Health(False, "decode: none of 1 workers is ready (lost)", {"decode": "gone"}))
    async with httpx2.AsyncClient(base_url=served.server.url) as client:
        got = await client.get("/ready")
    assert (got.status_code, got.json()["groups"]) == (503, {"decode": "gone"})


async def test_stopping_lets_streams_end_and_refuses_new_ones(serve_http, answer) -> None:
    go_on = asyncio.Event()
    first, *rest = answer("ab")
    served = await serve_http([first, go_on, *rest])
    async with served.client() as client:
        parts = await client.completions.create(**ASK, stream=True)
        assert (await anext(parts)).choices[0].text == "a"
        stop = asyncio.create_task(served.server.stop(grace_s=20))
        await asyncio.sleep(0.05)
        with pytest.raises(openai.APIStatusError, match="shutting down") as caught:
            await client.completions.create(**ASK)
        assert caught.value.status_code == 503
        async with httpx2.AsyncClient(base_url=served.server.url) as probe:
            assert (await probe.get("/ready")).status_code == 503
        go_on.set()
        assert "".join([part.choices[0].text async for part in parts]) == "b"
    await asyncio.wait_for(stop, 10)


async def test_what_is_not_done_in_time_is_ended_with_its_reason(serve_http, answer) -> None:
    served = await serve_http([answer("ab")[0], asyncio.Event()])
    async with served.client() as client:
        parts = await client.completions.create(**ASK, stream=True)
        await anext(parts)
        stop = asyncio.create_task(served.server.stop(grace_s=0))
        with pytest.raises(openai.APIError, match="shutting down: the request was not finished"):
            await anext(parts)
    await asyncio.wait_for(stop, 10)
    assert served.engine.closed.is_set()


async def test_a_request_belongs_to_the_trace_of_its_caller(serve_http, answer) -> None:
    served = await serve_http(answer("ok"))
    parent, state = f"00-{1:032x}-{2:016x}-01", "vendor=value"
    async with served.client() as client:
        await client.completions.create(**ASK, extra_headers={"Traceparent": parent, "Tracestate": state})
        await client.completions.create(**ASK)
    first, second = served.engine.requests
    assert (first.traceparent, first.tracestate) == (parent, state)
    assert (second.traceparent, second.tracestate) == ("", "")


async def test_a_request_has_the_name_that_its_client_gives(serve_http, answer) -> None:
    served = await serve_http(answer("ok"))
    async with served.client() as client:
        got = await client.completions.with_raw_response.create(**ASK, extra_headers={"X-Request-Id": "mine"})
        assert (got.headers["x-request-id"], got.parse().id) == ("mine", "cmpl-mine")
        assert served.engine.requests[-1].request_id == "mine"
        with pytest.raises(openai.BadRequestError, match="x-request-id has 129 bytes"):
            await client.completions.create(**ASK, extra_headers={"X-Request-Id": "r" * 129})
        await client.completions.create(**ASK, user="alice", extra_body={"priority": -3, "cache_salt": "mine"})
    asked = served.engine.requests[-1]
    assert (asked.user, asked.priority, asked.cache_salt) == ("alice", -3, b"mine")
