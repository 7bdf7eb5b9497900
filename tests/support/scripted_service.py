"""Both doors in front of an engine that answers with the text it is told, token by token, and no model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace

import openai
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.api import EngineRequest, ModelInfo, RequestReport, TokenChunk, WorkerStatus
from cluster.client.client import Connection
from cluster.config.load import load_config
from cluster.conversation.registry import choose_formats
from cluster.generation.text_generation import Generation
from cluster.routing.types import CandidateReport
from cluster.server.doors import Doors
from cluster.text.tokenizer import Tokenizer
from service_threads import running_in_thread
from workers.messages import FinishReason, TokenOutput

EOS = "<eos>"


def byte_vocabulary(special: tuple[str, ...]) -> RustTokenizer:
    """One token per byte, and special tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(list(special))
    return rust


def byte_tokenizer(chat_template: str, special: tuple[str, ...] = ()) -> Tokenizer:
    """One token per byte, special tokens, and one that ends a text."""
    hf = PreTrainedTokenizerFast(tokenizer_object=byte_vocabulary((*special, EOS)), eos_token=EOS)
    hf.chat_template = chat_template
    return Tokenizer(hf)


@dataclass
class TextEngine:
    """Answers every request with `text`, so many tokens at a time, and remembers what was asked.

    `token_ids`: the answer where no text says it.
    """

    tokenizer: Tokenizer
    text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    at_once: int = 1
    token_ids: tuple[int, ...] = ()
    requests: list[EngineRequest] = field(default_factory=list)
    block_sizes: frozenset[int] = frozenset()
    cache_identity: bytes = b""

    @property
    def prompt(self) -> str:
        """Of the last request."""
        return self.tokenizer.with_special_tokens.text_of(self.requests[-1].prompt_token_ids.tolist())

    def generate(self, request: EngineRequest) -> TextStream:
        self.requests.append(request)
        return TextStream(self, request.sampling.n)

    def workers(self) -> list[WorkerStatus]:
        return []

    def explain(self, request: EngineRequest) -> list[CandidateReport]:
        return []


class TextStream:
    """The answer of a `TextEngine`, as often as there are samples, side by side."""

    def __init__(self, engine: TextEngine, n: int) -> None:
        self._chunks = self._run(engine, n)

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self._chunks

    async def report(self) -> RequestReport:
        return RequestReport("p", "d")

    def complete(self) -> None:
        pass

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def _run(self, engine: TextEngine, n: int) -> AsyncGenerator[TokenChunk, None]:
        ids = [*engine.tokenizer.encode(engine.text, add_special_tokens=False), *engine.token_ids]
        if engine.finish_reason is FinishReason.STOP:
            ids += sorted(engine.tokenizer.eos_token_ids)
        tokens = [
            TokenOutput("r", token, attempt_id="r", finish_reason=engine.finish_reason if at == len(ids) else None)
            for at, token in enumerate(ids, 1)
        ]
        for at in range(0, len(tokens), engine.at_once):
            together = tokens[at : at + engine.at_once]
            yield TokenChunk(tuple(replace(token, index=index) for index in range(n) for token in together))


@dataclass
class ScriptedService:
    """A service whose doors are open, in a thread of its own."""

    doors: Doors
    engine: TextEngine

    @property
    def grpc(self) -> Connection:
        return Connection(self.doors.address)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.doors.http_url}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def scripted_service(
    chat_template: str, special: tuple[str, ...] = (), formats: Mapping[str, str] | None = None
) -> Iterator[ScriptedService]:
    """Start one, and stop it when the block ends.

    Args:
        chat_template: of the model that it pretends to serve.
        special: tokens.
        formats: what is not to be found from the template.
    """

    @contextlib.asynccontextmanager
    async def served() -> AsyncIterator[ScriptedService]:
        tokenizer = byte_tokenizer(chat_template, special)
        engine = TextEngine(tokenizer)
        info = ModelInfo(
            "scripted", "llama", "float32", 8192, tokenizer.vocab_size, tuple(tokenizer.eos_token_ids), True
        )
        wanted = {"tool_format": "auto", "reasoning_format": "auto", **(formats or {})}
        generation = Generation(engine, tokenizer, info, formats=choose_formats(**wanted, chat_template=chat_template))
        doors = Doors(load_config(environ={}, overrides={"server.port": 0}).server)
        await doors.open()
        await doors.serve(generation, engine, info)
        yield ScriptedService(doors, engine)
        await doors.stop(grace_s=0)

    with running_in_thread(served) as service:
        yield service
