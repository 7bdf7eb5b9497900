"""One service behind both doors for a module: workers in this process, the recall model, and the official client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import openai
import pytest

from cluster.api import ModelInfo
from cluster.client.client import Connection
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.generation.text_generation import Generation
from cluster.inprocess_worker import InProcessWorker
from cluster.recall import SHIPPED_MODEL
from cluster.server.doors import Doors
from cluster.server.openai.serve import HttpServer, start_http_server
from cluster.text.tokenizer import Tokenizer
from kv_transfer.transports.local import LocalFabric
from service_threads import running_in_thread
from workers.config import WorkerConfig


@dataclass
class Service:
    """A service whose doors are open, in a thread of its own."""

    doors: Doors
    engine: ServingEngine
    generation: Generation
    info: ModelInfo
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return self.doors.http_url

    @property
    def grpc(self) -> Connection:
        return Connection(self.doors.address)

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def until_idle(self) -> None:
        """No call is under way, the engine has forgotten every request, and every block of every worker is free."""

        for _ in range(2000):
            loads = [worker.load for worker in self.engine.workers()]
            free = all(load.free_blocks == load.total_blocks and not load.waiting for load in loads)
            if free and not self.doors.num_calls and not self.engine.num_attempts:
                return
            time.sleep(0.01)
        pytest.fail("calls are still under way")

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextlib.asynccontextmanager
async def _served() -> AsyncIterator[Service]:
    fabric = LocalFabric()
    settings = {"model": str(SHIPPED_MODEL), "dtype": "float32", "num_blocks": 256, "max_model_len": 512}
    places = {
        role: [partial(InProcessWorker, WorkerConfig(name=f"{role}-0", role=role, **settings), fabric)]
        for role in ("prefill", "decode")
    }
    engine = ServingEngine(places["prefill"], places["decode"], max_queue=64)
    await engine.start()
    tokenizer = Tokenizer.load(SHIPPED_MODEL)
    info = ModelInfo("recall", "llama", "float32", 512, tokenizer.vocab_size, tuple(tokenizer.eos_token_ids), True)
    generation = Generation(engine, tokenizer, info)
    doors = Doors(load_config(environ={}, overrides={"server.port": 0}).server)
    await doors.open()
    await doors.serve(generation, engine, info)
    yield Service(doors, engine, generation, info, asyncio.get_running_loop())
    await doors.stop(grace_s=0)
    await engine.stop()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_in_thread(_served) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


@dataclass
class HttpServed:
    """A running HTTP server around an engine that follows a script."""

    server: HttpServer
    engine: object

    def client(self, **options: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            **{"base_url": f"{self.server.url}/v1", "api_key": "none", "max_retries": 0, **options}
        )


@pytest.fixture
async def serve_http(byte_tokenizer, scripted) -> AsyncIterator[Callable[..., Awaitable[HttpServed]]]:
    """Start a server on a free loopback port; keyword arguments are settings of server.http, or of server."""
    servers: list[HttpServer] = []

    async def start(script: Sequence[object] = (), /, server: dict | None = None, **settings: object) -> HttpServed:
        given = {f"server.{name}": value for name, value in (server or {}).items()}
        own = {f"server.http.{name}": value for name, value in settings.items()}
        config = load_config(environ={}, overrides={"server.port": 0, **given, **own}).server
        engine, info = scripted(script)
        servers.append(await start_http_server(config, Generation(engine, byte_tokenizer, info), engine, info))
        return HttpServed(servers[-1], engine)

    yield start
    for each in servers:
        await each.stop(grace_s=0)
