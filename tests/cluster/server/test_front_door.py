"""How many messages carry an answer, and what a burst of calls meets."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager

import grpc

from cluster.api import ModelInfo, RequestReport, ServerInfo, TokenChunk
from cluster.client.client import AsyncBatonClient
from cluster.generation.text_generation import Generation
from cluster.server import garbage_collector
from cluster.server.grpc.service import BatonService
from cluster.server.grpc.stream_writer import StreamWriter
from cluster.server.pacing import Pacer
from cluster.server.unread import Writing
from protos import baton_pb2, baton_pb2_grpc
from workers.messages import FinishReason, TokenOutput

LARGE_BURST = 1600  # beyond what gRPC itself lets wait when it is not told otherwise
MODEL = ModelInfo("tiny", "llama", "float32", 64, 257, (), False)


class QueueEngine:
    """One stream, that gives all tokens which have come since it was last asked, as the engine's own does."""

    block_sizes: frozenset[int] = frozenset()
    cache_identity: bytes = b""

    def __init__(self) -> None:
        self._tokens: list[TokenOutput] = []
        self._news = asyncio.Event()
        self._over = False

    def push(self, text: str, finish: FinishReason | None = None) -> None:
        self._tokens += [TokenOutput("r", ord(c), attempt_id="r") for c in text[:-1]]
        self._tokens.append(TokenOutput("r", ord(text[-1]), finish_reason=finish, attempt_id="r"))
        self._news.set()

    def generate(self, request):
        return self

    def __aiter__(self):
        return self

    async def __anext__(self) -> TokenChunk:
        if self._over:
            raise StopAsyncIteration
        await self._news.wait()
        self._news.clear()
        tokens, self._tokens = tuple(self._tokens), []
        self._over = tokens[-1].finish_reason is not None
        return TokenChunk(tokens)

    async def report(self) -> RequestReport:
        return RequestReport("p", "d")

    def complete(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


class HeldCall:
    """A call's context: a message is written when somebody takes it."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._taken = asyncio.Semaphore(0)

    async def write(self, message: bytes) -> None:
        self._messages.put_nowait(message)
        await self._taken.acquire()

    async def next(self) -> baton_pb2.GenerateResponse:
        message = await self._messages.get()
        self._taken.release()
        return baton_pb2.GenerateResponse.FromString(message)


@asynccontextmanager
async def responses(engine: QueueEngine, tokenizer, pacer: Pacer):
    service = BatonService(Generation(engine, tokenizer, MODEL), engine, MODEL, pacer, lambda: ServerInfo("1", "", 0.0))
    request = baton_pb2.GenerateRequest(token_ids=baton_pb2.TokenIds(ids=[1]))
    call = HeldCall()

    async def answer() -> None:
        async with asyncio.timeout(60) as deadline:
            await service.Generate(request, 60.0, StreamWriter(call, Writing(deadline), pacer))

    answering = asyncio.create_task(answer())
    yield call
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)


async def settle_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_loop_that_keeps_up_sends_each_token_when_it_comes(byte_tokenizer) -> None:
    engine, pacer = QueueEngine(), Pacer()
    pacer.sample(0.4)
    async with responses(engine, byte_tokenizer, pacer) as call:
        for letter in "abc":
            engine.push(letter)
            message = asyncio.create_task(call.next())
            await settle_loop()
            assert message.done()
            assert len((await message).token_ids) == 1


async def test_a_loop_that_does_not_sends_tokens_together_but_the_first(byte_tokenizer) -> None:
    engine, pacer = QueueEngine(), Pacer()
    for _ in range(8):
        pacer.sample(1.0)
    async with responses(engine, byte_tokenizer, pacer) as call:
        engine.push("a")
        first = asyncio.create_task(call.next())
        await settle_loop()
        assert first.done(), "the first token does not wait"
        following = asyncio.create_task(call.next())
        for letter in "bcd":
            engine.push(letter)
            await settle_loop()
        assert len((await following).token_ids) == 3


async def test_cancelling_one_stream_that_waits_leaves_the_others(byte_tokenizer) -> None:
    pacer = Pacer()
    pacer.sample(1.0)
    turns = [asyncio.create_task(pacer.turn()) for _ in range(3)]
    await settle_loop()
    turns[0].cancel()
    assert await asyncio.gather(*turns[1:]) == [None, None]


def test_the_wait_grows_and_ends_with_the_load() -> None:
    pacer = Pacer()
    waits = []
    for busy in (1.0, 1.0, 0.7, 1.0, 1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3):
        pacer.sample(busy)
        waits.append(pacer.interval_s)
    assert waits[:7] == [0.01, 0.02, 0.02, 0.04, 0.08, 0.1, 0.1]
    assert waits[-1] == 0


async def test_the_last_token_and_the_end_are_one_message(serve: Callable, answer: Callable) -> None:
    served = await serve(answer("abc"))
    async with AsyncBatonClient(served.connection) as client:
        chunks = [chunk async for chunk in client.generate("x")]
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 1, 1]
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].text == "c"
    assert chunks[-1].report is not None


async def test_a_burst_reaches_the_service(serve: Callable) -> None:
    served = await serve([])
    with grpc.insecure_channel(served.server.address) as channel:
        ask = baton_pb2_grpc.BatonStub(channel).GetModelInfo
        # Sent while the event loop of the server stands still: all of them wait inside of gRPC.
        calls = [ask.future(baton_pb2.GetModelInfoRequest()) for _ in range(LARGE_BURST)]
        codes = await asyncio.to_thread(lambda: Counter(call.code() for call in calls))
    assert codes == {grpc.StatusCode.OK: LARGE_BURST}


def test_what_is_loaded_is_no_matter_for_the_collector() -> None:
    thresholds = gc.get_threshold()
    try:
        garbage_collector.settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] > thresholds[0]
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
