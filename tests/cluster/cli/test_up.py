"""`baton up` as a process of its own, with a launch that starts no workers."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import grpc
import httpx2
import pytest

from cluster.cli.main import main
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from workers.sampling_params import SamplingParams

ROOT = Path(__file__).parents[3]

# Stands in for the cluster: an engine that echoes one token, and a line on stderr when it is told to stop.
PROGRAM = """
import asyncio, contextlib, subprocess, sys, types
from cluster.api import ModelInfo, RequestReport, TokenChunk
from workers.errors import CheckpointError
from cluster.gateway.readiness import Health
from cluster.text.detokenizer import TokenKind
from workers.messages import FinishReason, TokenOutput

class Letters:
    anchor = ()
    special_token_ids = {}
    def token_kind(self, token_id):
        return TokenKind.TEXT
    def text_of(self, token_ids):
        return "".join(chr(token_id) for token_id in token_ids)
    def whole_text(self, token_id):
        return None

class Stream:
    def __init__(self, token, count):
        self.token, self.count = token, count
    async def __aiter__(self):
        for _ in range(1, self.count):
            yield TokenChunk((TokenOutput("r", self.token, attempt_id="r"),))
            await asyncio.sleep(0.05)
        yield TokenChunk((TokenOutput("r", self.token, finish_reason=FinishReason.LENGTH, attempt_id="r"),))
    async def report(self):
        return RequestReport("p-0", "d-0")
    def complete(self) -> None:
        pass

    async def aclose(self):
        pass

class Ready:
    health = Health(True, "")
    async def run(self):
        await asyncio.sleep(3600)
    async def follow(self):
        yield self.health

class Engine:
    block_sizes = frozenset()
    cache_identity = b""
    def generate(self, request):
        return Stream(int(request.prompt_token_ids[0]), request.sampling.max_tokens)
    def workers(self):
        return []

@contextlib.asynccontextmanager
async def launch(config, report):
    from cluster.generation.text_generation import Generation
    report("loading " + config.model.path)
    try:
        if config.model.path == "missing":
            raise CheckpointError("no checkpoint at missing")
        if config.model.path == "some/model":  # Ray's processes are forked while the doors are open
            for _ in range(5):
                await asyncio.to_thread(subprocess.run, ["true"], preexec_fn=lambda: None)
        if config.model.path == "slow":
            await asyncio.sleep(60)
        info = ModelInfo("echo", "llama", "float32", 2048, 256, (), False)
        generation = Generation(Engine(), Letters(), info)
        broken = asyncio.get_running_loop().create_future()
        if config.model.path == "breaks":
            broken.set_result("what it stands on is gone")
        parts = {"engine": Engine(), "generation": generation, "model_info": info, "readiness": Ready()}
        yield types.SimpleNamespace(**parts, broken=broken, observed=None)
    finally:
        print("launch closed", file=sys.stderr)

sys.modules["cluster.launch"] = module = types.ModuleType("cluster.launch")
module.launch = launch
from cluster.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def up() -> Iterator[Callable[..., subprocess.Popen]]:
    processes: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, "up", *arguments]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def read_line_with(stream: IO[str], text: str) -> None:
    assert any(text in line for line in stream), f"{text!r} was not printed"


def read_until(process: subprocess.Popen, text: str) -> str:
    lines = ""
    for line in process.stdout:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was not printed: {lines!r} {process.stderr.read()!r}")


def test_up_serves_until_a_signal_and_exits_with_0(up: Callable, capsys: pytest.CaptureFixture) -> None:
    process = up("--model", "some/model", "--port", "0")
    welcome = read_until(process, "Ctrl-C")
    address = re.search(r"on (127\.0\.0\.1:\d+)", welcome)[1]
    assert f'baton generate "Hello" --server {address}' in welcome
    assert f'grpcurl -plaintext -d \'{{"text": "Hello"}}\' {address} baton.v1.Baton/Generate' in welcome
    assert main(["status", "--server", address]) == 0
    assert "echo" in capsys.readouterr().out
    url = re.search(r"OpenAI's HTTP interface is at (http://127\.0\.0\.1:\d+)/v1", welcome)[1]
    assert f"curl {url}/v1/completions -H 'content-type: application/json' -d" in welcome
    answer = httpx2.post(f"{url}/v1/completions", json={"prompt": [70], "max_tokens": 2}).json()
    assert answer["choices"][0]["text"] == "FF"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "loading some/model" in err
    assert "launch closed" in err
    assert "fork" not in err, "gRPC has nothing to say to who starts a service"
    assert "Traceback" not in err


def test_a_signal_while_loading_stops_what_was_started(up: Callable) -> None:
    process = up("--model", "slow", "--port", "0")
    for line in process.stderr:
        if "loading slow" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "launch closed" in err
    assert "Traceback" not in err


def test_a_port_of_the_page_that_is_taken_is_told_before_anything_is_loaded(up: Callable) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = up("--model", "slow", "--port", "0", "--set", f"metrics.port={port}")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert "choose another metrics.port" in err
    assert "loading" not in err


def test_the_page_is_there_while_the_model_is_loaded(up: Callable, unused_tcp_port: int) -> None:
    process = up("--model", "slow", "--port", "0", "--set", f"metrics.port={unused_tcp_port}")
    read_line_with(process.stderr, "loading slow")
    with httpx2.Client(base_url=f"http://127.0.0.1:{unused_tcp_port}") as client:
        page, live = client.get("/"), client.get("/live.json")
        assert (page.status_code, "<title>Baton</title>" in page.text) == (200, True)
        assert (live.status_code, live.json()) == (503, {"starting": "loading slow"})
        assert client.get("/metrics").status_code == 503
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_a_service_that_cannot_go_on_says_why_and_ends_in_good_order(up: Callable) -> None:
    _, err = (process := up("--model", "breaks", "--port", "0")).communicate(timeout=60)
    assert process.returncode == 1
    lines = err.splitlines()
    assert "What it stands on is gone." in lines
    assert lines.index("launch closed") > next(i for i, line in enumerate(lines) if line.startswith("Draining"))
    assert lines[-1] == "baton up: what it stands on is gone"
    assert "Traceback" not in err


async def streams_through_a_signal(
    up: Callable, number: int, drain_timeout_s: float, count: int, num_tokens: int
) -> tuple[subprocess.Popen, AsyncBatonClient, list[asyncio.Task]]:
    """A service that has been sent a signal while it answers so many requests of so many tokens each."""
    process = up("--model", "m", "--port", "0", "--set", f"server.drain_timeout_s={drain_timeout_s}")
    address = re.search(r"on (127\.0\.0\.1:\d+)", await asyncio.to_thread(read_until, process, "Ctrl-C"))[1]
    client = AsyncBatonClient(Connection(address))
    sampling = SamplingParams(max_tokens=num_tokens)
    begun = [asyncio.Event() for _ in range(count)]

    async def generate(began: asyncio.Event) -> int:
        tokens = 0
        async for chunk in client.generate(token_ids=[70], sampling=sampling):
            began.set()
            tokens += len(chunk.token_ids)
        return tokens

    streams = [asyncio.create_task(generate(began)) for began in begun]
    for began in begun:
        await began.wait()
    process.send_signal(number)
    return process, client, streams


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_requests_under_way_are_finished_and_new_ones_are_told_to_go_elsewhere(up: Callable, number: int) -> None:
    process, client, streams = await streams_through_a_signal(up, number, 60, 24, 40)
    async with client:
        await asyncio.to_thread(read_line_with, process.stderr, "Draining")
        with pytest.raises(BatonClientError, match="shutting down: send the request elsewhere") as refusal:
            await anext(client.generate(token_ids=[70], sampling=SamplingParams(max_tokens=1), timeout_s=60))
        assert refusal.value.status is grpc.StatusCode.UNAVAILABLE
        assert await client.workers() == [], "what asks how it is, is answered"
        assert await asyncio.gather(*streams) == [40] * 24
    _, err = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0
    assert "launch closed" in err
    assert "Traceback" not in err


async def test_a_drain_has_an_end(up: Callable) -> None:
    process, client, streams = await streams_through_a_signal(up, signal.SIGTERM, 0.2, 2, 2000)
    async with client:
        ends = await asyncio.gather(*streams, return_exceptions=True)
    assert {end.status for end in ends} == {grpc.StatusCode.UNAVAILABLE}
    assert all("shutting down: the request was not finished" in str(end) for end in ends)
    _, err = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0
    assert "2 requests were not finished" in err
    assert "launch closed" in err


async def test_a_second_signal_ends_a_drain_at_once(up: Callable) -> None:
    process, client, streams = await streams_through_a_signal(up, signal.SIGTERM, 3600, 2, 2000)
    await asyncio.to_thread(read_line_with, process.stderr, "Draining")
    process.send_signal(signal.SIGINT)
    async with client:
        ends = await asyncio.gather(*streams, return_exceptions=True)
    assert {end.status for end in ends} == {grpc.StatusCode.UNAVAILABLE}
    _, err = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0
    assert "launch closed" in err


def test_a_taken_port_is_noticed_before_the_model_is_loaded(up: Callable) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = up("--model", "some/model", "--port", str(port))
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith(f"baton up: cannot listen on 127.0.0.1:{port}: address already in use")
    assert err.count("\n") == 1
    assert out == ""


def test_an_error_of_the_launch_is_one_line(up: Callable) -> None:
    process = up("--model", "missing", "--port", "0")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.endswith("baton up: no checkpoint at missing\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m", "--port", "x"), "server.port is 'x', it must be a whole number"),
        (
            ("--model", "m", "--set", "server.prot=1"),
            "unknown configuration key server.prot; did you mean server.port?",
        ),
        (("--model", "m", "--set", "server.port"), "--set server.port must be KEY=VALUE"),
        (("--model", "m", "--decode", "0"), "decode.replicas is 0, it must be at least 1"),
        (("--config", "/none.yaml"), "cannot read the configuration file /none.yaml: No such file or directory"),
    ],
)
def test_a_wrong_setting_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
