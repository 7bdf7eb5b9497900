"""Requests of several samples through the gateway: placed as what they take, followed, and continued after a loss."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.api import TokenChunk
from cluster.gateway.observers import EngineObserver
from cluster.generation.text_generation import Generation, GenerationRequest
from cluster.pools.groups import PoolLimits
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.types import NoPlacement, Placement, RoutingRequest
from cluster.routing.worker_state import WorkerTraits
from fleet import prompt
from made_requests import engine_request
from workers.errors import CapacityError, InvalidRequestError
from workers.messages import FinishReason, TokenOutput
from workers.sampling_params import SamplingParams

DRAWN = {"temperature": 1.2, "seed": 11}


async def samples_of(stream) -> dict[int, list[int]]:
    """The tokens of each sample of a stream."""
    samples: dict[int, list[int]] = {}
    async for chunk in stream:
        for token in chunk.tokens:
            samples.setdefault(token.index, []).append(token.token_id)
    return samples


async def alone(fleet, token_ids: list[int], max_tokens: int, n: int) -> dict[int, list[int]]:
    """What requests with the samples' seeds give."""
    seeds = {index: DRAWN["seed"] + index for index in range(n)}
    return {
        index: await fleet.run(token_ids, max_tokens, temperature=DRAWN["temperature"], seed=seed)
        for index, seed in seeds.items()
    }


class Events(EngineObserver):
    """What an observer was told of requests and attempts."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tokens = 0

    def request_migrated(self, attempt, error) -> None:
        self.said.append("migrated")

    def request_finished(self, request, attempt) -> None:
        self.said.append("finished")

    def request_cancelled(self, request, attempt) -> None:
        self.said.append("cancelled")

    def request_failed(self, request, attempt, error) -> None:
        self.said.append("failed")

    def tokens_received(self, received) -> None:
        self.tokens += sum(num_tokens for _, num_tokens, _ in received)


@pytest.mark.parametrize("disaggregation", ["always", "never"])
async def test_samples_are_those_of_requests_with_their_seeds(disaggregation, make_fleet):
    fleet = await make_fleet(disaggregation=disaggregation)
    expected = await alone(fleet, prompt(40), 6, 3)
    fleet.engine.observe(events := Events())
    stream = fleet.start(prompt(40), 6, n=3, **DRAWN)
    assert await samples_of(stream) == expected
    one = fleet.start(prompt(40, 1), 6, **DRAWN)
    many = fleet.start(prompt(40, 2), 6, n=3, **DRAWN)
    await asyncio.gather(samples_of(one), samples_of(many))
    moved = [(await each.report()).kv_bytes for each in (one, many)]
    assert moved[0] == moved[1], "the prompt is handed over once"
    assert events.said == ["finished"] * 3
    assert events.tokens == 7 * 6
    await fleet.until_idle()


async def test_those_that_have_not_ended_go_on_by_themselves_when_the_decode_worker_is_lost(make_fleet):
    fleet = await make_fleet(decode=2, num_blocks=256)
    free = await alone(fleet, prompt(40), 24, 3)
    stop = next(token for token in free[1][3:9] if token not in free[0] and token not in free[2])
    expected = {**free, 1: free[1][: free[1].index(stop) + 1]}
    fleet.engine.observe(events := Events())
    stream = fleet.start(prompt(40), 24, n=3, stop_token_ids=(stop,), **DRAWN)
    samples: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async for chunk in stream:
        for token in chunk.tokens:
            samples[token.index].append(token.token_id)
        if len(samples[1]) == len(expected[1]) and not events.said:
            events.said.append("lost")
            fleet.handle((await stream.report()).decode_worker.split(".")[0]).crash("killed by the test")
    assert samples == expected
    assert events.said == ["lost", "migrated", "finished"]
    report = await stream.report()
    assert report.attempts == 2
    await fleet.until_idle()


async def test_all_begin_again_when_none_has_a_token(make_fleet):
    fleet = await make_fleet(prefill=2)
    expected = await alone(fleet, prompt(40), 8, 2)
    fleet.crash_one_on_submit("prefill-0", "prefill-1")
    stream = fleet.start(prompt(40), 8, n=2, **DRAWN)
    assert await samples_of(stream) == expected
    assert (await stream.report()).attempts == 2
    await fleet.until_idle()


@pytest.mark.slow
async def test_a_worker_that_leaves_hands_its_samples_on(make_fleet):
    limits = {"decode": PoolLimits(drain_timeout_s=0.0)}
    fleet = await make_fleet(decode=2, num_blocks=256, limits=limits)
    expected = await alone(fleet, prompt(40), 30, 2)
    stream = fleet.start(prompt(40), 30, n=2, **DRAWN)
    samples: dict[int, list[int]] = {}
    async for chunk in stream:
        for token in chunk.tokens:
            samples.setdefault(token.index, []).append(token.token_id)
        if len(samples[0]) == 5:
            fleet.engine.scale({"decode": 1})
    assert samples == expected


@pytest.mark.parametrize("tokens", [0, 5])
async def test_cancelling_ends_all_of_them(tokens, make_fleet):
    fleet = await make_fleet()
    fleet.engine.observe(events := Events())
    async with aclosing(fleet.start(prompt(40), 300, n=4, **DRAWN)) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        if tokens:
            await waiting
            while events.tokens < tokens:
                await anext(stream)
        else:
            await asyncio.sleep(0.01)
            waiting.cancel()
    await fleet.until_idle()
    assert events.said == ["cancelled"]


async def test_a_sample_that_nobody_wants_is_stopped_and_its_place_is_free(make_fleet):
    fleet = await make_fleet(num_blocks=256)
    expected = await alone(fleet, prompt(40), 24, 3)
    stream = fleet.start(prompt(40), 24, n=3, **DRAWN)
    samples: dict[int, list[int]] = {}
    async for chunk in stream:
        for token in chunk.tokens:
            samples.setdefault(token.index, []).append(token.token_id)
        if len(samples[1]) < 24 and 1 in samples:
            stream.drop(1)
            stream.drop(1)
    assert {index: samples[index] for index in (0, 2)} == {index: expected[index] for index in (0, 2)}
    assert len(samples[1]) < 24
    await fleet.until_idle()


async def test_more_samples_than_a_worker_runs_are_refused(make_fleet):
    fleet = await make_fleet(max_num_seqs=4)
    with pytest.raises(CapacityError, match="n is 5, it runs at most 4 sequences at once"):
        await samples_of(fleet.start(prompt(10), 4, n=5, **DRAWN))
    assert len(await samples_of(fleet.start(prompt(10), 4, n=4, **DRAWN))) == 4
    await fleet.until_idle()


def traits(name: str, **settings) -> WorkerTraits:
    return WorkerTraits(**{"engine_id": name, "max_model_len": 512, "block_size": 16, "total_blocks": 20,
                           "max_num_seqs": 8, **settings})  # fmt: skip


def test_the_books_count_each_sample_and_what_they_share_once():
    books = LoadTracker()
    books.update_pools({traits("p"): True}, {traits("d"): True}, {})
    (decode,) = books.decode_workers.workers
    books.reserve("r", "p", "d", 40, 30, num_samples=4)
    assert (decode.running, decode.free_blocks) == (4, 20 - 2 - 4)
    books.grown("r", 64, 4)
    assert decode.free_blocks == 20 - 2 - 4 * 3
    books.sample_finished("r", 64)
    books.grown("r", 64, 3)
    assert (decode.running, decode.free_blocks) == (3, 20 - 2 - 3 * 3)
    assert isinstance(books.place(RoutingRequest(40, 1, num_samples=6)), NoPlacement), "five places are free"
    assert isinstance(books.place(RoutingRequest(40, 1, num_samples=5)), Placement)
    books.release("r")
    assert (decode.running, decode.free_blocks) == (0, 20)
    beyond = books.place(RoutingRequest(40, 1, num_samples=9))
    assert isinstance(beyond, NoPlacement)
    assert beyond.hopeless
    assert books.place(RoutingRequest(16 * 16, 1, num_samples=5)).hopeless, "a block for each beside 16 for all: 21"


class TwoSamples:
    """An engine whose answer has two samples, by turns."""

    block_sizes: frozenset[int] = frozenset()
    cache_identity: bytes = b""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.dropped: list[int] = []

    def generate(self, request):
        return self

    async def __aiter__(self):
        for step in range(max(map(len, self.texts))):
            ends = [FinishReason.LENGTH if step + 1 == len(text) else None for text in self.texts]
            yield TokenChunk(
                tuple(
                    TokenOutput("r", text[step], finish_reason=ends[i], index=i, attempt_id="r")
                    for i, text in enumerate(self.texts)
                    if step < len(text)
                )
            )

    async def report(self):
        return None

    def complete(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def drop(self, index: int) -> None:
        self.dropped.append(index)


async def test_each_sample_has_its_text_and_end_and_the_last_message_the_usage(byte_tokenizer, scripted):
    engine = TwoSamples([byte_tokenizer.encode(text) for text in ("one STOP more of it", "another one é")])
    generation = Generation(engine, byte_tokenizer, scripted([])[1])
    asked = GenerationRequest(request_id="r", prompt="hi", sampling=SamplingParams(n=2, stop=("STOP",)), timeout_s=5.0)
    chunks = [chunk async for chunk in generation.generate(asked)]
    texts = {index: "".join(c.text for c in chunks if c.index == index) for index in (0, 1)}
    assert texts == {0: "one ", 1: "another one é"}
    ends = [(c.index, c.finish_reason) for c in chunks if c.finish_reason is not None]
    assert ends == [(0, FinishReason.STOP), (1, FinishReason.LENGTH)]
    assert engine.dropped == [0], "the engine is told of what a stop string has ended"
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == 8 + 14


async def test_more_samples_than_the_service_allows_are_refused(byte_tokenizer, scripted):
    generation = Generation(TwoSamples([]), byte_tokenizer, scripted([])[1], max_n=3)
    asked = GenerationRequest(request_id="r", prompt="hi", sampling=SamplingParams(n=4), timeout_s=5.0)
    with pytest.raises(InvalidRequestError, match="n is 4, at most 3"):
        await anext(generation.generate(asked))


async def test_prompt_logprobs_are_once_in_the_first_chunk(make_fleet):
    fleet = await make_fleet()
    sampling = SamplingParams(seed=1, max_tokens=4, ignore_eos=True, prompt_logprobs=2, n=2)
    for _ in range(2):  # a prefix hit changes nothing
        request = engine_request("r", prompt(30), sampling)
        chunks = [chunk async for chunk in fleet.engine.generate(request)]
        assert [chunk.prompt_logprobs is None for chunk in chunks] == [False] + [True] * (len(chunks) - 1)
        assert chunks[0].prompt_logprobs.logprobs.shape == (29,)
        assert chunks[0].prompt_logprobs.top_token_ids.shape == (29, 2)
    assert replace(sampling, prompt_logprobs=None).prompt_logprobs is None
    await fleet.until_idle()
