"""Tokens become messages in the pass of the loop in which they come, and all else stays in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import closing

import grpc
import pytest

from cluster.api import ModelInfo
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.schema import ServerConfig
from cluster.gateway.observers import EngineObserver
from cluster.generation.answer import Answer
from cluster.generation.text_chunk import TextChunk
from cluster.generation.text_generation import Generation
from cluster.server.grpc.responses import ResponseWriter
from cluster.server.grpc.serve import start_server
from cluster.server.grpc.stream_writer import StreamWriter
from cluster.server.pacing import Pacer
from cluster.server.unread import UnreadStreams, Writing
from fleet import PATIENCE_S, prompt
from protos import baton_pb2
from workers.messages import FinishReason, TokenLogprob, TokenOutput
from workers.sampling_params import SamplingParams

MODEL = ModelInfo("tiny", "llama", "float32", 256, 512, (), False)
GREEDY = {"temperature": 0.0, "seed": 0, "ignore_eos": True}


@pytest.fixture
async def serve(make_fleet, byte_tokenizer) -> AsyncIterator[Callable]:
    running = []

    async def start(**settings):
        fleet = await make_fleet(**settings)
        generation = Generation(fleet.engine, byte_tokenizer, MODEL)
        server = await start_server(ServerConfig(port=0), generation, fleet.engine, MODEL)
        client = AsyncBatonClient(Connection(server.address))
        running.append((server, client))
        return fleet, client

    yield start
    for server, client in running:
        await client.close()
        await server.stop(grace_s=0)


async def test_the_task_of_a_call_writes_only_what_is_more_than_tokens(serve, expected, monkeypatch) -> None:
    fleet, client = await serve()
    by_task = []
    write = StreamWriter.write

    async def counted(self, message: bytes) -> None:
        by_task.append(baton_pb2.GenerateResponse.FromString(message))
        await write(self, message)

    monkeypatch.setattr(StreamWriter, "write", counted)
    stream = client.generate(token_ids=prompt(20), sampling=SamplingParams(max_tokens=24, **GREEDY))
    chunks = [chunk async for chunk in stream]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected(prompt(20), 24)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [FinishReason.LENGTH]
    assert chunks[-1].usage.completion_tokens == 24
    assert [message.finish_reason for message in by_task] == [baton_pb2.FINISH_REASON_LENGTH]
    assert len(chunks) > len(by_task)
    await fleet.until_idle()


async def test_a_stop_string_ends_a_text_whose_tokens_were_polled(serve) -> None:
    fleet, client = await serve()
    whole = client.generate(token_ids=prompt(20), sampling=SamplingParams(max_tokens=24, **GREEDY))
    text = "".join([chunk.text async for chunk in whole])
    stop = next(char for char in text if char != "\ufffd")
    sampling = SamplingParams(max_tokens=24, stop=(stop,), **GREEDY)
    chunks = [chunk async for chunk in client.generate(token_ids=prompt(20), sampling=sampling)]
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].stop_reason == stop
    await fleet.until_idle()


async def test_log_probabilities_of_a_prompt_come_first(serve) -> None:
    fleet, client = await serve()
    sampling = SamplingParams(max_tokens=6, prompt_logprobs=0, logprobs=0, **GREEDY)
    chunks = [chunk async for chunk in client.generate(token_ids=prompt(20), sampling=sampling)]
    assert len(chunks[0].prompt_logprobs) == 19
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])
    assert sum(len(chunk.logprobs) for chunk in chunks) == 6
    await fleet.until_idle()


async def test_a_client_that_leaves_ends_its_request(serve) -> None:
    fleet, client = await serve()
    stream = client.generate(token_ids=prompt(20), sampling=SamplingParams(max_tokens=200, **GREEDY))
    await anext(stream)
    await stream.aclose()
    await fleet.until_idle()


async def test_a_request_goes_on_elsewhere_behind_what_was_polled(serve, expected) -> None:
    fleet, client = await serve(decode=2)
    fleet.engine.observe(placed := Placed())
    stream = client.generate(token_ids=prompt(20), sampling=SamplingParams(max_tokens=40, **GREEDY))
    first = await anext(stream)
    fleet.handle(placed.decode[0].partition(".")[0]).crash("killed by the test")
    rest = [token async for chunk in stream for token in chunk.token_ids]
    assert [*first.token_ids, *rest] == expected(prompt(20), 40)
    assert len(placed.decode) == 2


async def test_a_reader_that_fails_fails_its_own_request_alone(serve, expected, monkeypatch) -> None:
    fleet, client = await serve()
    part, broken = ResponseWriter.part, []

    def fails(self, chunk: TextChunk) -> bytes:
        if broken and self is broken[0]:
            raise ZeroDivisionError
        return part(self, chunk)

    made = ResponseWriter.__init__

    def note(self, *args) -> None:
        made(self, *args)
        if not broken:
            broken.append(self)

    monkeypatch.setattr(ResponseWriter, "__init__", note)
    monkeypatch.setattr(ResponseWriter, "part", fails)
    with pytest.raises(BatonClientError):
        [_ async for _ in client.generate(token_ids=prompt(20), sampling=SamplingParams(max_tokens=8, **GREEDY))]
    stream = client.generate(token_ids=prompt(20), sampling=SamplingParams(max_tokens=8, **GREEDY))
    assert [token async for chunk in stream for token in chunk.token_ids] == expected(prompt(20), 8)
    await fleet.until_idle()


class Placed(EngineObserver):
    """On which decode workers."""

    def __init__(self) -> None:
        self.decode: list[str] = []

    def request_placed(self, request, attempt) -> None:
        self.decode.append(attempt.decode)


class SlowCall:
    """A call's context whose client takes a message when it is told to."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.sent: list[asyncio.Future[None]] = []

    async def write(self, message: bytes) -> None:
        self.messages.append(message)
        self.sent.append(asyncio.get_running_loop().create_future())
        await self.sent[-1]


class PolledParts:
    """Parts that are there for whoever polls."""

    def __init__(self) -> None:
        self.text, self.reader = "", None

    def listen(self, reader: Callable[[], None]) -> bool:
        self.reader = reader
        return True

    def poll(self) -> TextChunk | None:
        text, self.text = self.text, ""
        return TextChunk(text) if text else None

    def say(self, text: str) -> None:
        self.text += text
        self.reader()


async def written(call: SlowCall) -> None:
    call.sent[-1].set_result(None)
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.fixture
async def slow():
    async with asyncio.timeout(PATIENCE_S) as deadline:
        call, parts, pacer, unread = SlowCall(), PolledParts(), Pacer(), UnreadStreams(limit_s=0.0)
        with unread.stream(deadline) as writing, closing(StreamWriter(call, writing, pacer)) as writer:
            writer.follow(parts, lambda part: part.text.encode())
            yield call, parts, pacer, writer, (unread, writing)


async def test_what_comes_while_a_message_is_on_its_way_goes_in_the_next_one(slow) -> None:
    call, parts, _, writer, _ = slow
    for letter in "abc":
        parts.say(letter)
    assert call.messages == [b"a"]
    await written(call)
    assert call.messages == [b"a", b"bc"]
    last = asyncio.create_task(writer.write(b"end"))
    await asyncio.sleep(0)
    assert len(call.messages) == 2, "one message at a time is on its way"
    await written(call)
    assert call.messages == [b"a", b"bc", b"end"]
    await written(call)
    await last


async def test_streams_of_a_loop_that_is_late_wait_for_each_others_tokens(slow) -> None:
    call, parts, pacer, *_ = slow
    pacer.sample(1.0)
    parts.say("a")
    assert call.messages == [b"a"], "the first one does not wait"
    await written(call)
    parts.say("b")
    parts.say("c")
    assert call.messages == [b"a"]
    await pacer.turn()
    assert call.messages == [b"a", b"bc"]


async def test_a_stream_is_unread_only_while_a_message_is_on_its_way(slow) -> None:
    call, parts, _, _, (unread, writing) = slow
    parts.say("a")
    call.sent[-1].set_result(None)
    await asyncio.sleep(0.001)
    unread.look()
    assert not writing.late, "it has been read"
    parts.say("b")
    await asyncio.sleep(0.001)
    unread.look()
    assert writing.late
    writing.deadline.reschedule(None)


async def test_a_message_that_cannot_be_sent_ends_its_call() -> None:
    call, parts = SlowCall(), PolledParts()

    async def answer() -> None:
        async with asyncio.timeout(PATIENCE_S) as deadline:
            writer = StreamWriter(call, Writing(deadline), Pacer())
            writer.follow(parts, lambda part: part.text.encode())
            await asyncio.Event().wait()

    answering = asyncio.create_task(answer())
    await asyncio.sleep(0)
    parts.say("a")
    parts.say("b")
    call.sent[-1].set_exception(grpc.aio.UsageError("gone"))
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert call.messages == [b"a"]


TOKEN = TokenOutput("r", 7, attempt_id="r")
SCORED = TokenOutput("r", 7, logprob=-1.0, top_logprobs=(TokenLogprob(7, -1.0),), attempt_id="r")


@pytest.mark.parametrize(
    "chunk",
    [
        TextChunk("é", (TOKEN,)),
        TextChunk("", (TOKEN,)),
        TextChunk("ab", (TOKEN, TOKEN)),
        TextChunk("a", (SCORED,)),
        TextChunk("a", (TOKEN,), index=1),
        TextChunk("a", (TOKEN,), deltas=()),
        TextChunk("a", (TOKEN,), FinishReason.STOP, "a"),
    ],
)
def test_a_message_says_the_same_however_it_is_written(chunk: TextChunk) -> None:
    writer = ResponseWriter("r", str)
    for _ in range(2):  # the second one is remembered
        assert baton_pb2.GenerateResponse.FromString(writer.part(chunk)) == writer.response([chunk])


async def test_an_answer_that_cannot_be_polled_says_so() -> None:
    class Iterated:
        def __aiter__(self):
            return self

        async def __anext__(self):
            raise StopAsyncIteration

    answer = Answer(Iterated(), {}, 1, None)
    assert not answer.listen(lambda: None)
    assert answer.poll() is None
