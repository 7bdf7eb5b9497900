"""`baton bench` against a real server whose engine follows a script."""

import asyncio
import json
import signal
import struct
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.api import EngineRequest, ModelInfo, RequestReport, TokenChunk, WorkerStatus
from cluster.cli.main import main
from cluster.config.load import load_config
from cluster.errors import QueueFullError
from cluster.generation.text_generation import Generation
from cluster.server.grpc.serve import Server, start_server
from cluster.text.tokenizer import Tokenizer
from workers.messages import FinishReason, TokenOutput

ROOT = Path(__file__).parents[2]
REPORT = RequestReport("p-1", "d-1", 0.01, 0.02, 0.035, 0.004, 0.001, 0.005, 4096, 1)
MODEL = ModelInfo("tiny", "llama", "float32", 64, 257, (256,), False)


class _Stream:
    """Two tokens at a time until `max_tokens`, or an error at once."""

    def __init__(self, request: EngineRequest, error: Exception | None) -> None:
        self._left = request.sampling.max_tokens or 1
        self._error = error

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._error is not None:
            raise self._error
        if self._left == 0:
            raise StopAsyncIteration
        count = min(2, self._left)
        self._left -= count
        finish = FinishReason.LENGTH if self._left == 0 else None
        ends = [None] * (count - 1) + [finish]
        return TokenChunk(tuple(TokenOutput("r", 65, finish_reason=end, attempt_id="r") for end in ends))

    async def report(self) -> RequestReport:
        return REPORT

    def complete(self) -> None:
        pass

    async def aclose(self) -> None:
        self._left = 0


class _Engine:
    """Fails the requests whose numbers, counted from 0 and the warm-up included, are in `failing`."""

    block_sizes: frozenset[int] = frozenset()
    cache_identity: bytes = b""

    def __init__(self, failing: range) -> None:
        self.requests: list[EngineRequest] = []
        self.many = asyncio.Event()
        self._failing = failing

    def generate(self, request: EngineRequest) -> _Stream:
        self.requests.append(request)
        if len(self.requests) == 20:
            self.many.set()
        failed = len(self.requests) - 1 in self._failing
        return _Stream(request, QueueFullError("no room") if failed else None)

    def workers(self) -> list[WorkerStatus]:
        return []


async def _bench(engine: _Engine, tokenizer: Tokenizer, *arguments: str) -> int:
    config = load_config(environ={}, overrides={"server.port": 0}).server
    server: Server = await start_server(config, Generation(engine, tokenizer, MODEL), engine, MODEL)
    try:
        lengths = ("--prompt-tokens", "uniform:3:20", "--output-tokens", "fixed:5")
        return await asyncio.to_thread(main, ["bench", "--server", server.address, *lengths, *arguments])
    finally:
        await server.stop(grace_s=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<eos>"))


async def test_writes_table_json_and_plot(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = _Engine(failing=range(3, 5))
    output, plot = tmp_path / "new" / "run.json", tmp_path / "run.png"
    files = ("--output", str(output), "--plot", str(plot), "--slo", "ttft=60000", "--token", "secret")
    assert await _bench(engine, tokenizer, "--concurrency", "2", "--requests", "9", *files) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("TTFT", "ITL", "TPOT", "E2E", "handoff", "queue", "p99", "goodput"))
    assert "9 requests: 7 OK, 2 RESOURCE_EXHAUSTED" in out
    assert "no room" in out

    text = output.read_text()
    assert "secret" not in text
    result = json.loads(text)
    assert set(result) == {"kind", "schema", "environment", "config", "model", "summary", "requests"}
    assert result["summary"]["by_status"] == {"OK": 7, "RESOURCE_EXHAUSTED": 2}
    assert result["summary"]["goodput"]["requests"] == 7
    assert result["summary"]["handoff"]["p50"] == 0.001
    assert (result["config"]["concurrency"], result["config"]["seed"], result["model"]["name"]) == (2, 0, "tiny")
    assert {"date", "commit", "dirty", "packages", "cpu", "cores", "command"} <= set(result["environment"])
    assert {"torch", "transformers", "ray", "nixl"} <= set(result["environment"]["packages"])
    assert [row["index"] for row in result["requests"]] == list(range(9))
    good = next(row for row in result["requests"] if row["status"] == "OK")
    assert (good["output_tokens"], len(good["itl_s"]), good["report"]["kv_bytes"]) == (5, 4, 4096)
    assert good["ttft_s"] > 0

    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", plot.read_bytes()[16:24])
    assert (width, height) == (1100, 800)


async def test_ctrl_c_keeps_what_was_measured(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine, output = _Engine(failing=range(0)), tmp_path / "run.json"
    config = load_config(environ={}, overrides={"server.port": 0}).server
    server = await start_server(config, Generation(engine, tokenizer, MODEL), engine, MODEL)
    arguments = ("--duration", "60", "--concurrency", "2", "--prompt-tokens", "9", "--output-tokens", "5")
    command = (sys.executable, "-m", "cluster.cli.main", "bench", "--server", server.address, *arguments)
    command += ("--output", str(output))
    bench = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(20):
            await engine.many.wait()
            bench.send_signal(signal.SIGINT)
            out, err = await bench.communicate()
    finally:
        if bench.returncode is None:
            bench.kill()
        await server.stop(grace_s=0)
    result = json.loads(output.read_text())
    assert bench.returncode == 130
    assert result["config"]["interrupted"]
    assert result["requests"]
    assert f"of the {len(result['requests'])} requests that had ended" in err.decode()
    assert "TTFT" in out.decode()


async def test_the_same_seed_sends_the_same_requests_under_any_load(tokenizer: Tokenizer) -> None:
    sent = []
    for load in (("--concurrency", "1"), ("--rate", "1000")):
        engine = _Engine(failing=range(0))
        assert await _bench(engine, tokenizer, *load, "--requests", "6", "--seed", "5", "--warmup", "0") == 0
        sent.append({(tuple(request.prompt_token_ids), request.sampling) for request in engine.requests})
    assert sent[0] == sent[1]
    assert len(sent[0]) == 6
    assert all(sampling.ignore_eos and sampling.max_tokens == 5 and sampling.greedy for _, sampling in sent[0])


async def test_warm_up_is_sent_but_not_counted(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    engine = _Engine(failing=range(0))
    assert await _bench(engine, tokenizer, "--requests", "2", "--warmup", "3") == 0
    assert len({tuple(request.prompt_token_ids) for request in engine.requests}) == 5
    assert "2 requests: 2 OK" in capsys.readouterr().out


async def test_fails_when_every_request_failed(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert await _bench(_Engine(failing=range(100)), tokenizer, "--requests", "3") == 1
    assert "3 requests: 3 RESOURCE_EXHAUSTED" in capsys.readouterr().out


def test_an_unreachable_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--server", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert "cannot reach a Baton server at 127.0.0.1:1" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--concurrency", "-2"], "--concurrency is -2"),
        (["--requests", "0"], "--requests is 0"),
        (["--duration", "-1"], "--duration is -1"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--slo", "speed=3"], "--slo speed=3"),
        (["--prompt-tokens", "zipf:3"], "'zipf:3' is no distribution"),
        (["--output-tokens", "fixed:0"], "'fixed:0'"),
        (["--temperature", "-1"], "temperature is -1"),
    ],
)
def test_wrong_flags_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--server", "127.0.0.1:1", *arguments]) == 1
    assert message in capsys.readouterr().err
