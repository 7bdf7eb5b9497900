"""A served model without workers: a real tokenizer, server and client around an engine that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

from cluster.api import EngineRequest, ModelInfo, PoolTarget, RequestReport, TokenChunk, WorkerStatus
from cluster.client.client import Connection
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.generation.text_generation import Generation
from cluster.inprocess_worker import InProcessWorker
from cluster.pools import supervisor
from cluster.pools.groups import PoolLimits
from cluster.pools.patience import Patience
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.router import Choose, place
from cluster.routing.types import CandidateReport
from cluster.server.grpc import closing
from cluster.server.grpc.serve import Server, start_server
from cluster.text.tokenizer import Tokenizer
from fleet import Fleet
from kv_transfer.transports.local import Faults, LocalFabric
from workers.config import WorkerConfig
from workers.errors import InvalidRequestError
from workers.messages import FinishReason, Load, TokenOutput
from workers.runner.step_times import StepTimes

EOS = 256
MODEL = ModelInfo("tiny", "llama", "float32", 64, 257, (EOS,), True)
REPORT = RequestReport("p-1", "d-1", 0.01, 0.02, 0.035, 0.004, 0.001, 0.005, 4096, 1)
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"

Step = TokenChunk | RequestReport | Exception | asyncio.Event
"""Something to yield, to raise, or to wait for."""


@dataclass
class ScriptedEngine:
    """Yields the same script for every request, and remembers what was asked and whether it was closed early."""

    script: Sequence[Step] = ()
    requests: list[EngineRequest] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    targets: dict[str, int] = field(default_factory=lambda: {"prefill": 1, "decode": 1})
    block_sizes: frozenset[int] = frozenset()
    cache_identity: bytes = b""

    def generate(self, request: EngineRequest) -> ScriptedStream:
        self.requests.append(request)
        return ScriptedStream(self)

    def workers(self) -> list[WorkerStatus]:
        return [
            WorkerStatus("p-1", "prefill", "ready", "cpu", "TORCH_SDPA", 16, Load(100, 90, 5, 1, 2, 3, 77, 0)),
            WorkerStatus("d-1", "decode", "draining", "cuda:0", "FLASHINFER", 16, Load(200, 150)),
        ]

    def explain(self, request: EngineRequest) -> list[CandidateReport]:
        self.requests.append(request)
        return [
            CandidateReport("p-1.00", "d-2.00", 0.0123, 0.0045, 0.3, "", True, 64, 0.0021, 0.0, 32),
            CandidateReport(None, "d-2.00", 0.0151, 0.0045, 0.41, "", False, 32, 0.0, 0.1, 32),
            CandidateReport("p-1.00", "d-1.00", 0.0123, 0.0045, 0.3, "d-1.00: its batch is full", False),
        ]

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        if targets.get("decode", 1) > 4:
            raise InvalidRequestError(f"decode is {targets['decode']}, it must be in [1, 4]")
        self.targets.update(targets)
        return [PoolTarget(role, target, 1, 4) for role, target in self.targets.items()]


class ScriptedStream:
    """One request to a `ScriptedEngine`."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._steps = self._run()

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self._steps

    async def report(self) -> RequestReport:
        return REPORT

    def complete(self) -> None:
        pass

    async def aclose(self) -> None:
        await self._steps.aclose()

    async def _run(self) -> AsyncGenerator[TokenChunk, None]:
        self._engine.started.set()
        done = False
        try:
            for step in self._engine.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
            done = True
        finally:
            if not done:
                self._engine.closed.set()


@dataclass
class Served:
    """A running server, its engine, and how to reach it."""

    server: Server
    engine: ScriptedEngine
    connection: Connection
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token per byte, and token 256 that ends a text."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<eos>")
    hf.chat_template = CHAT_TEMPLATE
    return Tokenizer(hf)


@pytest.fixture
def answer(byte_tokenizer: Tokenizer) -> Callable[..., list[Step]]:
    """A script that answers a text, `chunk` tokens at a time, and reports."""

    def script(text: str, finish: FinishReason = FinishReason.LENGTH, chunk: int = 1) -> list[Step]:
        ids = byte_tokenizer.encode(text)
        if finish is FinishReason.STOP:
            ids.append(EOS)
        tokens = [
            TokenOutput("r", i, finish_reason=finish if n == len(ids) else None, attempt_id="r")
            for n, i in enumerate(ids, 1)
        ]
        chunks = [TokenChunk(tuple(tokens[at : at + chunk])) for at in range(0, len(tokens), chunk)]
        return list(chunks)

    return script


@pytest.fixture
def scripted() -> Callable[[Sequence[Step]], tuple[ScriptedEngine, ModelInfo]]:
    """An engine that follows a script, and the model that it pretends to serve."""
    return lambda script: (ScriptedEngine(script), MODEL)


@pytest.fixture
async def serve(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Start a server on a free loopback port; keyword arguments are settings of its section."""
    servers: list[Server] = []
    for name in ("ON_THEIR_WAY_S", "GOODBYE_S"):  # nobody calls when they stop
        monkeypatch.setattr(closing, name, 0.0)

    async def start(
        script: Sequence[Step] = (), sampling_defaults: Mapping[str, object] | None = None, **settings: object
    ) -> Served:
        overrides = {"server.port": 0, **{f"server.{name}": value for name, value in settings.items()}}
        config = load_config(environ={}, overrides=overrides).server
        engine = ScriptedEngine(script)
        server = await start_server(config, Generation(engine, byte_tokenizer, MODEL, sampling_defaults), engine, MODEL)
        servers.append(server)
        return Served(server, engine, Connection(server.address), byte_tokenizer)

    yield start
    for server in servers:
        await server.stop(grace_s=0)


@pytest.fixture
async def make_fleet(tiny_checkpoint, monkeypatch):
    """Start an engine; `prefill` and `decode` have the settings of each place's worker, by group if there are any."""
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_S", (0.01,))
    started: list[ServingEngine] = []

    async def make(
        prefill: int | list[dict] | dict[str, list[dict]] = 1,
        decode: int | list[dict] | dict[str, list[dict]] = 1,
        *,
        faults: Faults | None = None,
        max_queue: int = 64,
        worker_class: type[InProcessWorker] = InProcessWorker,
        limits: dict[str, PoolLimits] | None = None,
        silence_s: float | None = None,
        patience: dict | None = None,
        tokenizer: str | None = None,
        disaggregation: str = "always",
        choose: Choose = place,
        **settings,
    ) -> Fleet:
        fabric = LocalFabric(faults)

        def places(role: str, pool: int | list[dict] | dict[str, list[dict]], prefix: str = ""):
            if isinstance(pool, dict):
                return {name: places(role, each, f"{name}-") for name, each in pool.items()}
            each = [{}] * pool if isinstance(pool, int) else pool
            base = {
                "model": str(tiny_checkpoint("llama")),
                "dtype": "float32",
                "num_blocks": 64,
                "max_model_len": 512,
                "max_num_batched_tokens": 64,
                "local_prefill": role == "decode" and disaggregation != "always",
                **settings,
            }
            named = [{"name": f"{role}-{prefix}{i}", "role": role, **base, **own} for i, own in enumerate(each)]
            return [partial(worker_class, WorkerConfig(**settings), fabric) for settings in named]

        pools = {"prefill": places("prefill", prefill), "decode": places("decode", decode)}
        engine = ServingEngine(
            **pools,
            max_queue=max_queue,
            limits=limits,
            patience=Patience(silence_s, **patience or {}),
            tokenizer=tokenizer,
            load_tracker=LoadTracker(choose, disaggregation=disaggregation),
        )
        started.append(engine)
        await engine.start()
        return Fleet(engine, fabric, pools)

    yield make
    for engine in started:
        await engine.stop()


@pytest.fixture(scope="session")
def expected(tiny_checkpoint, reference_greedy) -> Callable[[list[int], int], list[int]]:
    """What transformers generates greedily."""
    return partial(reference_greedy, tiny_checkpoint("llama"))


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process measure every size once: these tests start hundreds of them."""
    monkeypatch.setattr("workers.runner.measured_steps.MIN_REPEATS", 1)
    monkeypatch.setattr("workers.runner.measured_steps.MAX_REPEATS", 1)


@pytest.fixture
def like_workers(monkeypatch) -> None:
    """Every worker measures the same."""
    measured = StepTimes(prefill=((100, 0.1),), decode=((1, 0.01), (16, 0.02)))
    monkeypatch.setattr("workers.builder.measure_step_times", lambda *args, **kwargs: measured)
