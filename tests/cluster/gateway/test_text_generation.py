"""The text pipeline on a scripted engine, without a server."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.api import TokenChunk, Usage
from cluster.gateway.text_generation import Conversation, Generation, GenerationRequest, TextChunk
from cluster.routing.prefix_index import PromptPrefix
from cluster.text.tokenizer import ChatMessage, Tokenizer
from workers.errors import DeadlineExceededError
from workers.kv_cache.prefix_cache import BlockHashes, block_hashes
from workers.messages import FinishReason, TokenOutput
from workers.sampling_params import SamplingParams

Answer = Callable[..., list]


@pytest.fixture
def run(byte_tokenizer: Tokenizer, scripted: Callable) -> Callable:
    async def generate(script: list, **sampling: object) -> list[TextChunk]:
        engine, model = scripted(script)
        generation = Generation(engine, byte_tokenizer, model)
        request = GenerationRequest("r", "hi", SamplingParams(**sampling), timeout_s=5.0)
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


async def test_a_stop_token_counts_but_its_text_is_not_shown(run: Callable, byte_tokenizer: Tokenizer) -> None:
    tokens = [TokenOutput("r", i) for i in byte_tokenizer.encode("ab")]
    last = TokenOutput("r", byte_tokenizer.encode(";")[0], finish_reason=FinishReason.STOP)
    chunks = await run([TokenChunk((*tokens, last))], stop_token_ids=(last.token_id,))
    assert text_of(chunks) == "ab"
    assert chunks[-1].usage == Usage(2, 3)


async def test_an_unfinished_character_at_the_end_is_shown_as_one(run: Callable, answer: Answer) -> None:
    chunk = answer("é")[0]
    cut = TokenOutput("r", chunk.tokens[0].token_id, finish_reason=FinishReason.LENGTH)
    assert text_of(await run([TokenChunk((cut,))])) == "\ufffd"


async def test_a_text_that_a_stop_string_ended_has_its_report_too(run: Callable, answer: Answer) -> None:
    chunks = await run(answer("ab.cd"), stop=(".",))
    assert chunks[-1].report is not None
    assert chunks[-1].report.kv_bytes > 0


async def test_closing_the_generator_closes_the_engine(
    byte_tokenizer: Tokenizer, answer: Answer, scripted: Callable
) -> None:
    engine, model = scripted([answer("ab")[0], asyncio.Event()])
    request = GenerationRequest("r", (1, 2), SamplingParams(), timeout_s=5.0)
    async with aclosing(Generation(engine, byte_tokenizer, model).generate(request)) as chunks:
        await anext(chunks)
        assert not engine.closed.is_set()
    assert engine.closed.is_set()


async def test_a_deadline_that_passed_while_tokenising_starts_nothing(
    byte_tokenizer: Tokenizer, answer: Answer, scripted: Callable
) -> None:
    engine, model = scripted(answer("ab"))
    request = GenerationRequest("r", "hi", SamplingParams(), timeout_s=0.0)
    with pytest.raises(DeadlineExceededError):
        await anext(Generation(engine, byte_tokenizer, model).generate(request))
    assert not engine.requests


async def test_a_conversation_is_tokenised_by_the_template(byte_tokenizer: Tokenizer, scripted: Callable) -> None:
    engine, model = scripted([])
    generation = Generation(engine, byte_tokenizer, model)
    token_ids = await generation.tokenize(Conversation((ChatMessage("user", "hi"),)))
    assert byte_tokenizer.decode(token_ids) == "[user]hi[assistant]"


@pytest.mark.parametrize("length", [40, 3000])
async def test_a_prompt_is_hashed_before_the_engine_sees_it(
    byte_tokenizer: Tokenizer, scripted: Callable, answer: Answer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    engine, model = scripted(answer("ab"))
    engine.block_sizes = frozenset({16, 64})
    generation = Generation(engine, byte_tokenizer, replace(model, max_model_len=5000))
    text = "x" * length
    token_ids = byte_tokenizer.encode(text)
    expected = {size: block_hashes(token_ids, size)[: (len(token_ids) - 1) // size] for size in engine.block_sizes}
    hashed_by: list[threading.Thread] = []
    prepare = PromptPrefix.prepare

    def watched(prefix: PromptPrefix, block_sizes: Iterable[int]) -> None:
        hashed_by.append(threading.current_thread())
        prepare(prefix, block_sizes)

    monkeypatch.setattr(PromptPrefix, "prepare", watched)
    [_ async for _ in generation.generate(GenerationRequest("r", text, SamplingParams(), timeout_s=5.0))]
    await generation.explain(GenerationRequest("r", text, SamplingParams(), timeout_s=5.0))
    assert len(engine.requests) == len(hashed_by) == 2
    assert all((thread is threading.main_thread()) == (length == 40) for thread in hashed_by)
    for request in engine.requests:
        monkeypatch.setattr(BlockHashes, "extend", None)  # what is asked for now is there
        for block_size in (16, 64):
            assert request.prefix.hashes(block_size) == expected[block_size]
