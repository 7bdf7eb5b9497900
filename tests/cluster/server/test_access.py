"""Who can reach the server, and how: token, TLS, ports, health, reflection, stopping."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.server import reloaded
from cluster.server.grpc.access import ROLE_OF_METHOD
from cluster.server.grpc.listen import check_server, exposure_warnings
from cluster.server.grpc.service import SERVICE
from workers.errors import ConfigError

Serve = Callable[..., Awaitable]
Answer = Callable[..., list]


async def generate(connection: Connection) -> str:
    async with AsyncBatonClient(connection) as client:
        return "".join([chunk.text async for chunk in client.generate("x", timeout_s=20)])


async def status_of_new_call(connection: Connection) -> grpc.StatusCode:
    async with AsyncBatonClient(connection) as client:
        try:
            await client.model_info(timeout_s=5)
        except BatonClientError as error:
            return error.status
    return grpc.StatusCode.OK


async def health(channel: grpc.aio.Channel) -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="baton.v1.Baton"))
    return response.status


async def reflected(
    channel: grpc.aio.Channel, version: str = "v1", **asked: str
) -> tuple[reflection_pb2.ServerReflectionResponse, grpc.aio.StreamStreamCall]:
    """The answer of either version, and its call; messages of both are the same bytes."""
    metadata = asked.pop("metadata", None)
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(**asked)]), metadata=metadata)
    return await call.read(), call


async def services(channel: grpc.aio.Channel, version: str = "v1", **kwargs) -> set[str]:
    response, call = await reflected(channel, version, list_services="", **kwargs)
    if response is grpc.aio.EOF:
        raise AssertionError(await call.code())
    return {service.name for service in response.list_services_response.service}


@pytest.mark.parametrize(
    ("token", "message"), [(None, "no bearer token"), ("wrong", "wrong bearer token"), ("", "wrong bearer token")]
)
async def test_without_the_right_token_every_call_is_refused(serve: Serve, token: str | None, message: str) -> None:
    served = await serve([], auth_token="s3cret")
    connection = replace(served.connection, token=token)
    async with AsyncBatonClient(connection) as client:
        for call in (client.model_info(), client.workers(), anext(aiter(client.generate("x")))):
            with pytest.raises(BatonClientError, match=message) as caught:
                await call
            assert caught.value.status is grpc.StatusCode.UNAUTHENTICATED
    assert not served.engine.requests


async def test_with_the_right_token_calls_go_through(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("ok"), auth_token="s3cret")
    assert await generate(replace(served.connection, token="s3cret")) == "ok"


async def test_each_token_is_good_for_its_roles_and_the_file_is_read_again(
    serve: Serve, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloaded, "LOOK_INTERVAL_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text("generate asks\noperate looks\nboth\n")
    served = await serve(answer("ok"), auth_token_file=str(path))

    async def statuses(token: str) -> list[str]:
        """Of a call that generates, one that operates and one that any token is good for."""
        found = []
        async with AsyncBatonClient(replace(served.connection, token=token)) as client:
            for call in (anext(aiter(client.generate("x"))), client.workers(), client.model_info()):
                try:
                    await call
                    found.append("OK")
                except BatonClientError as error:
                    found.append(error.status.name)
        return found

    assert await statuses("asks") == ["OK", "PERMISSION_DENIED", "OK"]
    assert await statuses("looks") == ["PERMISSION_DENIED", "OK", "OK"]
    assert await statuses("both") == ["OK", "OK", "OK"]
    path.write_text("generate asks-anew\n")
    assert await statuses("asks-anew") == ["OK", "PERMISSION_DENIED", "OK"]
    assert await statuses("asks") == ["UNAUTHENTICATED"] * 3
    path.write_text("")  # being written: nothing is open, the tokens before stay
    assert await statuses("asks-anew") == ["OK", "PERMISSION_DENIED", "OK"]


def test_every_method_has_a_role() -> None:
    assert set(ROLE_OF_METHOD) == {f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods}


async def test_a_token_that_a_header_cannot_carry_is_refused(serve: Serve) -> None:
    for token in ("päss", "a\nb"):
        with pytest.raises(ConfigError, match="bearer token"):
            await serve([], auth_token=token)
        with pytest.raises(ConfigError, match="bearer token"):
            await check_server(load_config(environ={}, overrides={"server.port": 0, "server.auth_token": token}).server)
        with pytest.raises(ConfigError, match="bearer token"):
            AsyncBatonClient(Connection(token=token))


async def test_the_token_guards_reflection_but_not_health(serve: Serve) -> None:
    served = await serve([], auth_token="s3cret")
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises((grpc.aio.AioRpcError, AssertionError), match="UNAUTHENTICATED"):
            await services(channel)
        assert "baton.v1.Baton" in await services(channel, metadata=(("authorization", "Bearer s3cret"),))


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_of_reflection_tell_of_all_services(serve: Serve, version: str) -> None:
    served = await serve([])
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        both = {f"grpc.reflection.{name}.ServerReflection" for name in ("v1", "v1alpha")}
        assert await services(channel, version) == {"baton.v1.Baton", "grpc.health.v1.Health", *both}
        for name in ("baton.v1.Baton", f"grpc.reflection.{version}.ServerReflectionRequest"):
            response, _ = await reflected(channel, version, file_containing_symbol=name)
            (file, *_) = response.file_descriptor_response.file_descriptor_proto
            assert name.rpartition(".")[0].encode() in file


async def test_reflection_can_be_turned_off(serve: Serve) -> None:
    served = await serve([], reflection=False)
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        with pytest.raises((grpc.aio.AioRpcError, AssertionError), match="UNIMPLEMENTED"):
            await services(channel)


def test_a_taken_port_stops_the_start_with_one_line() -> None:
    async def start() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            config = load_config(environ={}, overrides={"server.port": port}).server
            with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: address already in use"):
                await check_server(config)

    asyncio.run(start())


async def test_a_second_server_on_the_same_port_fails(serve: Serve) -> None:
    served = await serve([])
    with pytest.raises(ConfigError, match="address already in use"):
        await serve([], port=served.server.port)


async def test_a_host_that_is_not_ours_is_refused() -> None:
    config = load_config(environ={}, overrides={"server.host": "192.0.2.1", "server.port": 0}).server
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await check_server(config)


async def test_stopping_lets_a_call_finish_and_takes_no_new_one(serve: Serve, answer: Answer) -> None:
    go_on = asyncio.Event()
    first, *rest = answer("ab")
    served = await serve([first, go_on, *rest])
    call = asyncio.create_task(generate(served.connection))
    await asyncio.wait_for(served.engine.started.wait(), 5)
    stop = asyncio.create_task(served.server.stop(grace_s=20))
    await asyncio.sleep(0)
    with pytest.raises(BatonClientError, match="shutting down: send the request elsewhere") as refusal:
        await generate(served.connection)
    assert refusal.value.status is grpc.StatusCode.UNAVAILABLE
    assert await status_of_new_call(served.connection) is grpc.StatusCode.OK, "what asks how it is, is answered"
    go_on.set()
    assert await call == "ab"
    await stop
    assert await status_of_new_call(served.connection) is grpc.StatusCode.UNAVAILABLE


async def test_stopping_ends_calls_that_take_longer_than_the_grace(serve: Serve) -> None:
    served = await serve([asyncio.Event()])
    call = asyncio.create_task(generate(served.connection))
    await asyncio.wait_for(served.engine.started.wait(), 5)
    await served.server.stop(grace_s=0)
    await asyncio.wait_for(served.engine.closed.wait(), 5)
    with pytest.raises(BatonClientError):
        await call


def test_listening_beyond_this_machine_warns_about_what_is_missing() -> None:
    def warnings(**settings: object) -> str:
        overrides = {f"server.{name}": value for name, value in settings.items()}
        return "\n".join(exposure_warnings(load_config(environ={}, overrides=overrides).server))

    assert warnings() == warnings(host="::1") == warnings(host="localhost") == ""
    assert "auth_token" in warnings(host="0.0.0.0")
    assert "tls_cert" in warnings(host="10.0.0.1", auth_token="t")
    assert warnings(host="0.0.0.0", auth_token="t", tls_cert="c", tls_key="k") == ""


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA (ca.pem) and certificates signed by it for a server and a client; and one that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certs")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl(*new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca")
    openssl(*new, "-keyout", "stranger.key", "-out", "stranger.pem", "-subj", "/CN=stranger")
    for name in ("server", "client"):
        openssl(
            *new, "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE",
        )  # fmt: skip
    for name, days, names in (("expired", "-1", "IP:127.0.0.1"), ("other", "2", "DNS:other.example")):
        (folder / "names").write_text(f"subjectAltName={names}")
        openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", "request",
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", "request", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", days,
            "-extfile", "names", "-out", f"{name}.pem",
        )  # fmt: skip
    return folder


async def test_tls_serves_who_trusts_the_certificate_and_nobody_else(serve: Serve, answer: Answer, certs: Path) -> None:
    served = await serve(answer("ok"), tls_cert=str(certs / "server.pem"), tls_key=str(certs / "server.key"))
    assert await generate(replace(served.connection, tls_ca=str(certs / "ca.pem"))) == "ok"
    for ca in (None, str(certs / "stranger.pem")):
        with pytest.raises(BatonClientError, match="cannot reach a Baton server") as caught:
            await generate(replace(served.connection, tls_ca=ca))
        assert caught.value.status is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_that_is_replaced_is_shown_to_the_next_connection(
    serve: Serve, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloaded, "LOOK_INTERVAL_S", 0.0)
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def put(name: str) -> None:
        cert.write_bytes((certs / f"{name}.pem").read_bytes())
        key.write_bytes((certs / f"{name}.key").read_bytes())

    def shown() -> str:
        return ssl.get_server_certificate((host, int(port)), timeout=10)

    put("server")
    served = await serve([], tls_cert=str(cert), tls_key=str(key))
    host, _, port = served.server.address.rpartition(":")
    assert await asyncio.to_thread(shown) == (certs / "server.pem").read_text()
    cert.write_bytes((certs / "client.pem").read_bytes())  # its key has not come yet
    assert await asyncio.to_thread(shown) == (certs / "server.pem").read_text()
    put("client")
    assert await asyncio.to_thread(shown) == (certs / "client.pem").read_text()


async def test_mutual_tls_asks_for_the_clients_certificate(serve: Serve, answer: Answer, certs: Path) -> None:
    served = await serve(
        answer("ok"),
        tls_cert=str(certs / "server.pem"), tls_key=str(certs / "server.key"), tls_client_ca=str(certs / "ca.pem"),
    )  # fmt: skip
    trusting = replace(served.connection, tls_ca=str(certs / "ca.pem"))
    known = replace(trusting, tls_cert=str(certs / "client.pem"), tls_key=str(certs / "client.key"))
    stranger = replace(trusting, tls_cert=str(certs / "stranger.pem"), tls_key=str(certs / "stranger.key"))
    assert await generate(known) == "ok"
    for connection in (trusting, stranger):
        with pytest.raises(BatonClientError):
            await generate(connection)
    assert len(served.engine.requests) == 1


@pytest.mark.parametrize(
    ("server", "client", "reason"),
    [
        ("server", {"tls_ca": "stranger.pem"}, r"not signed by any in .*stranger\.pem .*CERTIFICATE_VERIFY_FAILED"),
        ("expired", {"tls_ca": "ca.pem"}, "the server's certificate has expired"),
        ("other", {"tls_ca": "ca.pem"}, r"the server's certificate is not for 127\.0\.0\.1"),
        ("server", {}, "may want TLS: give its CA file"),
        (None, {"tls_ca": "ca.pem"}, "does not speak TLS: leave the CA file out"),
        ("server for clients", {"tls_ca": "ca.pem"}, "may ask for a client certificate"),
        (
            "server for clients",
            {"tls_ca": "ca.pem", "tls_cert": "stranger.pem", "tls_key": "stranger.key"},
            "not trust",
        ),
        (None, {"tls_ca": "ca.key"}, r"ca\.key \(the CA file\) holds no PEM certificates"),
        (None, {"tls_ca": "ca.pem", "tls_cert": "client.key", "tls_key": "client.key"}, "no PEM certificate with its"),
        (None, {"tls_ca": "ca.pem", "tls_cert": "client.pem", "tls_key": "stranger.key"}, "key values mismatch"),
    ],
)
async def test_each_tls_mistake_has_its_reason(
    serve: Serve, answer: Answer, certs: Path, server: str | None, client: dict[str, str], reason: str
) -> None:
    settings = {}
    if server is not None:
        name = server.partition(" ")[0]
        settings = {"tls_cert": str(certs / f"{name}.pem"), "tls_key": str(certs / f"{name}.key")}
        settings |= {"tls_client_ca": str(certs / "ca.pem")} if "clients" in server else {}
    served = await serve(answer("ok"), **settings)
    with pytest.raises((BatonClientError, ConfigError), match=reason):
        await generate(replace(served.connection, **{name: str(certs / file) for name, file in client.items()}))


async def test_where_nobody_listens_the_question_is_whether_baton_runs() -> None:
    with pytest.raises(BatonClientError, match=r"is `baton up` running there.*Connection refused"):
        await generate(Connection("127.0.0.1:1"))


async def test_tls_files_that_are_missing_or_wrong_are_named(certs: Path) -> None:
    def config(cert: str, key: str):
        overrides = {"server.port": 0, "server.tls_cert": str(certs / cert), "server.tls_key": str(certs / key)}
        return load_config(environ={}, overrides=overrides).server

    with pytest.raises(ConfigError, match=r"cannot read server\.tls_cert .*none\.pem: No such file"):
        await check_server(config("none.pem", "server.key"))
    with pytest.raises(ConfigError, match="no certificate with its key"):
        await check_server(config("server.pem", "client.key"))
    with pytest.raises(ConfigError, match="no certificate with its key"):
        await check_server(config("server.key", "server.key"))


def test_client_tls_files_are_checked() -> None:
    async def make(connection: Connection) -> None:
        AsyncBatonClient(connection)

    for connection, message in (
        (Connection(tls_ca="/none/ca.pem"), r"cannot read /none/ca\.pem: No such file"),
        (Connection(tls_cert="a"), "needs TLS"),
        (Connection(tls_ca="a", tls_cert="b"), "given together"),
    ):
        with pytest.raises(ConfigError, match=message):
            asyncio.run(make(connection))
