"""The text pipeline on a scripted engine, without a server."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import fields, replace

import numpy as np
import pytest

from cluster.api import TokenChunk, Usage
from cluster.conversation.messages import ChatMessage
from cluster.generation.text_chunk import TextChunk
from cluster.generation.text_generation import Conversation, Generation, GenerationRequest
from cluster.routing.prefix_index import PromptPrefix
from cluster.text.tokenizer import Tokenizer
from workers.block_hashes import BlockHashes, PromptHashes, block_hashes
from workers.errors import DeadlineExceededError, InvalidRequestError
from workers.messages import FinishReason, RequestOptions, TokenOutput
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

Answer = Callable[..., list]


@pytest.fixture
def run(byte_tokenizer: Tokenizer, scripted: Callable) -> Callable:
    async def generate(script: list, **sampling: object) -> list[TextChunk]:
        engine, model = scripted(script)
        generation = Generation(engine, byte_tokenizer, model)
        request = GenerationRequest(request_id="r", prompt="hi", sampling=SamplingParams(**sampling), timeout_s=5.0)
        return [chunk async for chunk in generation.generate(request)]

    return generate


def text_of(chunks: list[TextChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
async def test_characters_are_never_split(run: Callable, answer: Answer, chunk: int) -> None:
    chunks = await run(answer("aé漢🎉b", chunk=chunk))
    assert text_of(chunks) == "aé漢🎉b"
    assert all("\ufffd" not in piece.text for piece in chunks)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
async def test_no_part_of_a_stop_string_is_shown(run: Callable, answer: Answer, chunk: int) -> None:
    chunks = await run(answer("one STOP two", chunk=chunk), stop=("STOP", "two"))
    assert text_of(chunks) == "one "
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].usage == Usage(2, 8)
    assert sum(len(piece.tokens) for piece in chunks) == 8


async def test_what_only_began_as_a_stop_string_is_shown_at_the_end(run: Callable, answer: Answer) -> None:
    chunks = await run(answer("abc STO"), stop=("STOP",))
    assert text_of(chunks) == "abc STO"
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_a_stop_string_does_not_count_before_min_tokens(run: Callable, answer: Answer) -> None:
    assert text_of(await run(answer("a.b.c.d"), stop=(".",), min_tokens=5)) == "a.b.c"


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize(
    ("stop", "min_tokens", "shown"),
    [("abc", 2, "xx"), ("abc", 5, "xx"), ("abc", 6, "xxabcab"), ("cab", 6, "xxab"), ("ca", 4, "xxab")],
)
async def test_a_stop_string_across_the_border_of_min_tokens_counts(
    run: Callable, answer: Answer, stop: str, min_tokens: int, shown: str, chunk: int
) -> None:
    """It counts where its last character comes, whole: none of it is shown."""
    chunks = await run(answer("xxabcab", chunk=chunk), stop=(stop,), min_tokens=min_tokens)
    assert text_of(chunks) == shown
    stopped = shown != "xxabcab"
    assert chunks[-1].finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


async def test_a_stop_string_that_is_a_special_token_goes_to_the_workers(
    byte_tokenizer: Tokenizer, scripted: Callable, answer: Answer
) -> None:
    engine, model = scripted(answer("ab"))
    generation = Generation(engine, byte_tokenizer, replace(model, eos_token_ids=(7, 256)))

    async def sent(**sampling: object) -> tuple[int, ...]:
        request = GenerationRequest(request_id="r", prompt="hi", sampling=SamplingParams(**sampling), timeout_s=5.0)
        async for _ in generation.generate(request):
            pass
        return engine.requests[-1].sampling.stop_token_ids

    assert await sent() == ()
    assert await sent(ignore_eos=True, stop=("<eos>", "x"), stop_token_ids=(3,)) == (3, 256)
    with pytest.raises(InvalidRequestError, match="special token '<eos>' and more"):
        await sent(stop=("x<eos>",))
    with pytest.raises(InvalidRequestError, match="min_tokens is 2, but all 257 tokens"):
        await sent(min_tokens=2, stop_token_ids=tuple(range(256)))


async def test_a_stop_token_counts_but_its_text_is_not_shown(run: Callable, byte_tokenizer: Tokenizer) -> None:
    tokens = [TokenOutput("r", i, attempt_id="r") for i in byte_tokenizer.encode("ab")]
    last = TokenOutput("r", byte_tokenizer.encode(";")[0], finish_reason=FinishReason.STOP, attempt_id="r")
    chunks = await run([TokenChunk((*tokens, last))], stop_token_ids=(last.token_id,))
    assert text_of(chunks) == "ab"
    assert chunks[-1].usage == Usage(2, 3)


async def test_an_unfinished_character_at_the_end_is_shown_as_one(run: Callable, answer: Answer) -> None:
    chunk = answer("é")[0]
    cut = TokenOutput("r", chunk.tokens[0].token_id, finish_reason=FinishReason.LENGTH, attempt_id="r")
    assert text_of(await run([TokenChunk((cut,))])) == "\ufffd"


async def test_a_text_that_a_stop_string_ended_has_its_report_too(run: Callable, answer: Answer) -> None:
    chunks = await run(answer("ab.cd"), stop=(".",))
    assert chunks[-1].report is not None
    assert chunks[-1].report.kv_bytes > 0


async def test_closing_the_generator_closes_the_engine(
    byte_tokenizer: Tokenizer, answer: Answer, scripted: Callable
) -> None:
    engine, model = scripted([answer("ab")[0], asyncio.Event()])
    request = GenerationRequest(request_id="r", prompt=as_token_ids((1, 2)), sampling=SamplingParams(), timeout_s=5.0)
    async with aclosing(Generation(engine, byte_tokenizer, model).generate(request)) as chunks:
        await anext(chunks)
        assert not engine.closed.is_set()
    assert engine.closed.is_set()


async def test_a_deadline_that_passed_while_tokenising_starts_nothing(
    byte_tokenizer: Tokenizer, answer: Answer, scripted: Callable
) -> None:
    engine, model = scripted(answer("ab"))
    request = GenerationRequest(request_id="r", prompt="hi", sampling=SamplingParams(), timeout_s=0.0)
    with pytest.raises(DeadlineExceededError):
        await anext(Generation(engine, byte_tokenizer, model).generate(request))
    assert not engine.requests


async def test_a_conversation_is_tokenised_by_the_template(byte_tokenizer: Tokenizer, scripted: Callable) -> None:
    engine, model = scripted([])
    generation = Generation(engine, byte_tokenizer, model)
    token_ids = await generation.tokenize(Conversation((ChatMessage("user", "hi"),)))
    assert byte_tokenizer.decode(token_ids) == "[user]hi[assistant]"


@pytest.mark.parametrize(("length", "as_ids"), [(40, True), (40, False), (3000, True), (3000, False)])
async def test_a_prompt_is_hashed_once_and_before_the_engine_sees_it(
    byte_tokenizer: Tokenizer,
    scripted: Callable,
    answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    as_ids: bool,
) -> None:
    """On the tokeniser's threads, but for a few token ids, which are hashed before a thread could hear of them."""
    engine, model = scripted(answer("ab"))
    engine.block_sizes = frozenset({16, 64})
    generation = Generation(engine, byte_tokenizer, replace(model, max_model_len=5000))
    token_ids = byte_tokenizer.encode("x" * length)
    expected = {size: block_hashes(token_ids, size)[: (len(token_ids) - 1) // size] for size in engine.block_sizes}
    whole = {size: b"".join(block_hashes(token_ids, size)) for size in engine.block_sizes}
    hashed_by: list[threading.Thread] = []
    prepare = PromptPrefix.prepare

    def watched(prefix: PromptPrefix, block_sizes: Iterable[int]) -> None:
        hashed_by.append(threading.current_thread())
        prepare(prefix, block_sizes)

    monkeypatch.setattr(PromptPrefix, "prepare", watched)
    prompt = as_token_ids(token_ids) if as_ids else "x" * length
    asked = GenerationRequest(request_id="r", prompt=prompt, sampling=SamplingParams(), timeout_s=5.0)
    [_ async for _ in generation.generate(asked)]
    await generation.explain(asked)
    assert len(engine.requests) == len(hashed_by) == 2
    assert all((thread is threading.main_thread()) == (as_ids and length == 40) for thread in hashed_by)
    monkeypatch.setattr(BlockHashes, "extend", None)  # what is asked for now is there
    for request in engine.requests:
        for block_size in (16, 64):
            assert request.prefix.hashes(block_size) == expected[block_size]
            assert request.prefix.carried(block_size) == PromptHashes(block_size, whole[block_size])
        assert request.prefix.carried(32) is None, "which no worker has"


async def test_what_a_door_is_asked_reaches_the_engine(byte_tokenizer: Tokenizer, scripted: Callable, answer) -> None:
    """All that is known of a request but for its prompt, sampling and deadline is passed on as it is."""
    engine, model = scripted(answer("a"))
    said = {"priority": -3, "user": "ann", "cache_salt": b"tenant", "traceparent": f"00-{1:032x}-{1:016x}-01"}
    said["tracestate"] = "vendor=value"
    own = {"request_id", "sampling", "timeout_s", "cache_owner"}
    assert said.keys() == {f.name for f in fields(RequestOptions)} - own
    asked = GenerationRequest(request_id="one\ntwo", prompt="hi", sampling=SamplingParams(), timeout_s=5.0, **said)
    [_ async for _ in Generation(engine, byte_tokenizer, model).generate(asked)]
    (request,) = engine.requests
    assert {name: getattr(request, name) for name in said} == said
    assert request.request_id == "one\\ntwo", "on one line"
    assert (request.prompt_token_ids.dtype, request.prompt_token_ids.flags.writeable) == (np.int32, False)
