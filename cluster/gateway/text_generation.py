"""From a prompt to a stream of text: what stands between a server and the engine, whatever the wire format.

Validate, tokenise, run the engine, detokenise, look for stop strings, count.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

from cluster.api import Engine, EngineRequest, Explanation, ModelInfo, RequestReport, Usage
from cluster.gateway.prompt_positions import PromptPosition, check_prompt_logprobs, prompt_positions
from cluster.request_id import clean_request_id
from cluster.routing.prefix_index import PromptPrefix
from cluster.text.detokenizer import IncrementalDetokenizer
from cluster.text.stop import StopStrings
from cluster.text.tokenizer import ChatMessage, Tokenizer
from workers.errors import DeadlineExceededError, InvalidRequestError
from workers.messages import FinishReason, RequestOptions, TokenOutput, shared_options
from workers.sampling_params import SamplingParams
from workers.token_ids import TokenIds, as_token_ids
from workers.validation import check_token_ids

DEFAULT_MAX_N = 64
_TOKENIZER_THREADS = 2
_HASHED_AT_ONCE = 1024
"""Tokens: that many are hashed in less time than another thread takes to hear of it."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Conversation:
    """Chat messages, oldest first."""

    messages: tuple[ChatMessage, ...]


Prompt = str | TokenIds | Conversation
"""A text, token ids, or a conversation for the checkpoint's chat template."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest(RequestOptions):
    """What a client asks for. An empty `model` accepts the served one."""

    prompt: Prompt
    model: str = ""


@dataclass(frozen=True)
class TextChunk:
    """A part of an answer. `finish_reason`, `usage` and `report` are in the last one.

    Of several samples each has a part of its own, the last of them with its finish reason; `usage` and `report` are in
    the last of all. Log-probabilities of the prompt are in the first.
    """

    text: str
    tokens: tuple[TokenOutput, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    report: RequestReport | None = None
    index: int = 0
    prompt_logprobs: tuple[PromptPosition, ...] | None = None


class Generation:
    """Generates text with one model.

    Args:
        engine: runs token ids.
        tokenizer: of the served checkpoint.
        model_info: the served model's name and limits.
        max_n: samples of one request at most.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model_info: ModelInfo, max_n: int = DEFAULT_MAX_N) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model_info
        self._max_n = max_n
        # Its own threads: a few huge prompts must not hold up everything else that runs in the default executor.
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextChunk, None]:
        """Run one request. Closing the generator cancels it.

        Raises:
            InvalidRequestError: the request is wrong; nothing was started.
            BatonError: what the engine raises.
        """
        arrival = time.monotonic()
        engine_request = await self._engine_request(request)
        timeout_s = request.timeout_s - (time.monotonic() - arrival)
        if timeout_s <= 0:
            raise DeadlineExceededError(f"the deadline of {request.timeout_s:.3g} s passed while tokenising")
        engine_request = replace(engine_request, timeout_s=timeout_s)
        sampling, prompt = engine_request.sampling, engine_request.prompt_token_ids
        texts = {index: _TextAssembler(self._tokenizer, sampling) for index in range(sampling.n)}
        num_tokens, last, positions = 0, TextChunk(""), None
        async with aclosing(self._engine.generate(engine_request)) as stream:
            async for chunk in stream:
                if chunk.prompt_logprobs is not None:
                    positions = await self._in_thread(prompt_positions, prompt, chunk.prompt_logprobs, self.token_text)
                for index, tokens in _by_sample(chunk.tokens):
                    if (text := texts.get(index)) is None:
                        continue  # a stop string was found before
                    part = text.push(tokens)
                    if index or positions is not None:
                        part, positions = replace(part, index=index, prompt_logprobs=positions), None
                    if text.finish_reason is None:
                        yield part
                        continue
                    del texts[index]
                    num_tokens += text.num_tokens
                    last = replace(part, text=part.text + text.finish(), finish_reason=text.finish_reason)
                    if texts:
                        if text.stopped:
                            stream.drop(index)
                        yield last
                if not texts:
                    break  # What is still on its way nobody wants: closing the stream stops it.
            report = await stream.report()
        if texts:
            raise RuntimeError(f"the engine ended request {engine_request.request_id} without a finish reason")
        yield replace(last, usage=Usage(prompt_tokens=len(prompt), completion_tokens=num_tokens), report=report)

    async def explain(self, request: GenerationRequest) -> Explanation:
        """Where a request would go if it came now. Nothing is started.

        Raises:
            InvalidRequestError: the request is wrong.
        """
        asked = await self._engine_request(request)
        pairs = self._engine.explain(asked)
        return Explanation(len(asked.prompt_token_ids), asked.sampling.max_tokens or 1, tuple(pairs))

    async def tokenize(self, prompt: Prompt, model: str = "") -> TokenIds:
        """Check a prompt and turn it into token ids.

        Raises:
            InvalidRequestError: it is empty, too long, or has ids out of range; or `model` is not the served one.
        """
        self._check_model(model)
        if isinstance(prompt, np.ndarray):
            return self._checked(prompt)
        return await self._in_thread(self._encode, prompt)

    async def _engine_request(self, request: GenerationRequest) -> EngineRequest:
        """The one request that goes from here to the workers, checked and whole; long work is done on other threads.

        Raises:
            InvalidRequestError: the request is wrong.
        """
        self._check_model(request.model)
        if isinstance(request.prompt, np.ndarray) and len(request.prompt) <= _HASHED_AT_ONCE:
            prompt, prefix = self._hashed(request.prompt, request.cache_salt)
        else:
            prompt, prefix = await self._in_thread(self._hashed, request.prompt, request.cache_salt)
        options = shared_options(request)
        options["request_id"] = clean_request_id(request.request_id)
        options["sampling"] = self._complete(request.sampling, len(prompt))
        return EngineRequest(**options, prompt_token_ids=prompt, prefix=prefix)

    def _hashed(self, prompt: Prompt, cache_salt: bytes) -> tuple[TokenIds, PromptPrefix]:
        """A prompt's token ids, and its blocks as prefix caches are asked for them."""
        token_ids = self._checked(prompt) if isinstance(prompt, np.ndarray) else self._encode(prompt)
        prefix = PromptPrefix(token_ids, cache_salt)
        prefix.prepare(self._engine.block_sizes)
        return token_ids, prefix

    async def _in_thread(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Do long work on another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *args, **kwargs))

    def token_text(self, token_id: int) -> str:
        """A token's text by itself; special tokens have none."""
        return self._tokenizer.decode([token_id])

    def _check_model(self, model: str) -> None:
        if model and model != self._model.name:
            raise InvalidRequestError(f"model {model!r} is not served here; this server serves {self._model.name!r}")

    def _checked(self, token_ids: TokenIds) -> TokenIds:
        check_token_ids(token_ids, self._model.vocab_size)
        self._check_length(len(token_ids))
        return token_ids

    def _encode(self, prompt: str | Conversation) -> TokenIds:
        is_text = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._tokenizer.apply_chat_template(prompt.messages)
        if is_text and not text:
            raise InvalidRequestError("the prompt is empty")
        self._tokenizer.check_length(text, self._model.max_model_len)
        token_ids = as_token_ids(self._tokenizer.encode(text, add_special_tokens=is_text))
        self._check_length(len(token_ids))
        return token_ids

    def _check_length(self, num_tokens: int) -> None:
        limit = self._model.max_model_len
        if num_tokens == 0:
            raise InvalidRequestError("the prompt is empty")
        if num_tokens + 1 > limit:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; with one token to generate that is more than the context window "
                f"of {limit} tokens"
            )

    def _complete(self, sampling: SamplingParams, prompt_len: int) -> SamplingParams:
        """Keep `max_tokens` within the context window, and draw a seed if none was given."""
        if sampling.n > self._max_n:
            raise InvalidRequestError(f"n is {sampling.n}, at most {self._max_n} samples of a prompt are served")
        check_prompt_logprobs(sampling, prompt_len)
        check_token_ids(as_token_ids(sampling.stop_token_ids, "stop token"), self._model.vocab_size, "stop token")
        room = self._model.max_model_len - prompt_len
        if sampling.min_tokens > room:
            raise InvalidRequestError(
                f"min_tokens is {sampling.min_tokens}, but after a prompt of {prompt_len} tokens the context window "
                f"of {self._model.max_model_len} has room for {room}"
            )
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return replace(sampling, max_tokens=max_tokens, seed=seed)


def _by_sample(tokens: Sequence[TokenOutput]) -> Iterable[tuple[int, Sequence[TokenOutput]]]:
    """The tokens of each sample, in order."""
    if all(token.index == tokens[0].index for token in tokens):
        return [(tokens[0].index, tokens)] if tokens else []
    samples: dict[int, list[TokenOutput]] = {}
    for token in tokens:
        samples.setdefault(token.index, []).append(token)
    return samples.items()


class _TextAssembler:
    """The text of one answer, token by token, up to a stop string.

    Attributes:
        finish_reason: why the text ended; None while it goes on.
        stopped: a stop string was found; what comes after it is not part of the answer.
        num_tokens: tokens taken.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.finish_reason: FinishReason | None = None
        self.stopped = False
        self.num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(sampling.stop)
        self._min_tokens = sampling.min_tokens

    def push(self, tokens: Sequence[TokenOutput]) -> TextChunk:
        """Take tokens up to the one that completes a stop string, and return them with the text that is certain."""
        text = ""
        for position, token in enumerate(tokens):
            self.num_tokens += 1
            self.finish_reason = token.finish_reason
            # The token that ended the text is not part of it.
            if token.finish_reason is not FinishReason.STOP:
                text += self._scan(self._detokenizer.push([token.token_id]))
            if self.stopped:
                return TextChunk(text, tuple(tokens[: position + 1]))
        return TextChunk(text, tuple(tokens))

    def finish(self) -> str:
        """The rest of the text: what had been held back."""
        if self.stopped:
            return ""
        return self._scan(self._detokenizer.finish()) + self._stops.finish()

    def _scan(self, text: str) -> str:
        if self.num_tokens < self._min_tokens:
            return text
        kept, self.stopped = self._stops.push(text)
        if self.stopped:
            self.finish_reason = FinishReason.STOP
        return kept
