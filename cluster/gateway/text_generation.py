"""From a prompt to a stream of text: what stands between a server and the engine, whatever the wire format.

Validate, tokenise, run the engine, detokenise, look for stop strings, count.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster.api import Engine, EngineRequest, Explanation, ModelInfo, RequestReport, Usage
from cluster.errors import ModelNotFoundError
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

_TOKENIZER_THREADS = 2
_HASHED_AT_ONCE = 1024
"""Tokens: that many are hashed in less time than another thread takes to hear of it."""


@dataclass(frozen=True)
class Conversation:
    """Chat messages, oldest first, and how the checkpoint's template is to write them; see `Tokenizer`."""

    messages: tuple[ChatMessage, ...]
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


Prompt = str | TokenIds | Conversation
"""A text, token ids, or a conversation for the checkpoint's chat template."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest(RequestOptions):
    """What a client asks for. An empty `model` accepts the served one.

    `add_special_tokens`: begin (or end) the prompt with what the checkpoint's tokenizer adds; None: a text, and not a
    conversation, whose template writes it.
    """

    prompt: Prompt
    model: str = ""
    add_special_tokens: bool | None = None


@dataclass(frozen=True)
class TextChunk:
    """A part of an answer. `finish_reason`, `stop_reason`, `usage` and `report` are in the last one.

    `stop_reason`: the stop string, or the one of the request's stop tokens, that ended the text; None: something else.
    """

    text: str
    tokens: tuple[TokenOutput, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    report: RequestReport | None = None


class Generation:
    """Generates text with one model.

    Args:
        engine: runs token ids.
        tokenizer: of the served checkpoint.
        model_info: the served model's name and limits.
        sampling_defaults: of what a request's sampling leaves open, by name.

    Attributes:
        sampling_defaults: the same, for the doors.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model_info: ModelInfo,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampling_defaults = dict(sampling_defaults or {})
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model_info
        # Its own threads: a few huge prompts must not hold up everything else that runs in the default executor.
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextChunk, None]:
        """Run one request. Closing the generator cancels it.

        Raises:
            InvalidRequestError: the request is wrong; nothing was started.
            BatonError: what the engine raises.
        """
        async with aclosing(self.run(await self.prepare(request))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def prepare(self, request: GenerationRequest) -> EngineRequest:
        """The one request that goes from here to the workers, checked and whole, for `run`.

        Raises:
            InvalidRequestError: the request is wrong.
            DeadlineExceededError: no time is left.
        """
        arrival = time.monotonic()
        engine_request = await self._engine_request(request)
        timeout_s = request.timeout_s - (time.monotonic() - arrival)
        if timeout_s <= 0:
            raise DeadlineExceededError(f"the deadline of {request.timeout_s:.3g} s passed while tokenising")
        return replace(engine_request, timeout_s=timeout_s)

    async def run(self, engine_request: EngineRequest) -> AsyncGenerator[TextChunk, None]:
        """Run what `prepare` has made. Closing the generator cancels it.

        Raises:
            BatonError: what the engine raises.
        """
        text = _TextAssembler(self._tokenizer, engine_request.sampling, self._model.eos_token_ids)
        async with aclosing(self._engine.generate(engine_request)) as stream:
            last = TextChunk("")
            async for chunk in stream:
                part = text.push(chunk.tokens)
                if text.finish_reason is None:
                    yield part
                else:
                    last = part  # it goes with the end, in one message
                if text.stopped:
                    break  # There is more on its way that nobody wants: closing the stream stops it.
            report = await stream.report()
        if text.finish_reason is None:
            raise RuntimeError(f"the engine ended request {engine_request.request_id} without a finish reason")
        rest = text.finish()
        usage = Usage(prompt_tokens=len(engine_request.prompt_token_ids), completion_tokens=text.num_tokens)
        yield TextChunk(last.text + rest, last.tokens, text.finish_reason, text.stop_reason, usage, report)

    async def explain(self, request: GenerationRequest) -> Explanation:
        """Where a request would go if it came now. Nothing is started.

        Raises:
            InvalidRequestError: the request is wrong.
        """
        asked = await self._engine_request(request)
        pairs = self._engine.explain(asked)
        return Explanation(len(asked.prompt_token_ids), asked.sampling.max_tokens or 1, tuple(pairs))

    async def tokenize(self, prompt: Prompt, model: str = "", add_special_tokens: bool | None = None) -> TokenIds:
        """Check a prompt and turn it into token ids, as `generate` does.

        Raises:
            InvalidRequestError: it is empty, too long, or has ids out of range; or `model` is not the served one.
        """
        self._check_model(model)
        if isinstance(prompt, np.ndarray):
            return self._checked(prompt)
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self._encode, prompt, add_special_tokens
        )

    async def detokenize(self, token_ids: TokenIds, model: str = "") -> str:
        """The text of token ids, special tokens as they are spelled.

        Raises:
            InvalidRequestError: ids out of range, more than the context window has, or `model` is not the served one.
        """
        self._check_model(model)
        check_token_ids(token_ids, self._model.vocab_size)
        if len(token_ids) > self._model.max_model_len:
            raise InvalidRequestError(
                f"{len(token_ids)} tokens are given; the context window has {self._model.max_model_len}"
            )
        decode = self._tokenizer.with_special_tokens.decode
        return await asyncio.get_running_loop().run_in_executor(self._executor, decode, token_ids.tolist())

    async def _engine_request(self, request: GenerationRequest) -> EngineRequest:
        """The one request that goes from here to the workers, checked and whole; long work is done on other threads.

        Raises:
            InvalidRequestError: the request is wrong.
        """
        self._check_model(request.model)
        if isinstance(request.prompt, np.ndarray) and len(request.prompt) <= _HASHED_AT_ONCE:
            prompt, prefix = self._hashed(request)
        else:
            prompt, prefix = await asyncio.get_running_loop().run_in_executor(self._executor, self._hashed, request)
        options = shared_options(request)
        options["request_id"] = clean_request_id(request.request_id)
        options["sampling"] = self._complete(request.sampling, len(prompt))
        return EngineRequest(**options, prompt_token_ids=prompt, prefix=prefix)

    def _hashed(self, request: GenerationRequest) -> tuple[TokenIds, PromptPrefix]:
        """A prompt's token ids, and its blocks as prefix caches are asked for them."""
        if isinstance(request.prompt, np.ndarray):
            token_ids = self._checked(request.prompt)
        else:
            token_ids = self._encode(request.prompt, request.add_special_tokens)
        prefix = PromptPrefix(token_ids, request.cache_salt)
        prefix.prepare(self._engine.block_sizes)
        return token_ids, prefix

    def token_text(self, token_id: int) -> str:
        """A token's text by itself; special tokens have none."""
        return self._tokenizer.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special ones as they are spelled."""
        return self._tokenizer.token_bytes(token_id)

    def token_name(self, token_id: int) -> str:
        """A token as the checkpoint spells it."""
        return self._tokenizer.token_name(token_id)

    async def text_of(self, token_ids: TokenIds) -> str:
        """The text of a prompt that was given as token ids; special tokens have none."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._tokenizer.decode, token_ids.tolist())

    def _check_model(self, model: str) -> None:
        if model and model != self._model.name:
            raise ModelNotFoundError(f"model {model!r} is not served here; this server serves {self._model.name!r}")

    def _checked(self, token_ids: TokenIds) -> TokenIds:
        check_token_ids(token_ids, self._model.vocab_size)
        self._check_length(len(token_ids))
        return token_ids

    def _encode(self, prompt: str | Conversation, add_special_tokens: bool | None) -> TokenIds:
        is_text = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._rendered(prompt)
        if is_text and not text:
            raise InvalidRequestError("the prompt is empty")
        self._tokenizer.check_length(text, self._model.max_model_len)
        add = is_text if add_special_tokens is None else add_special_tokens
        token_ids = as_token_ids(self._tokenizer.encode(text, add_special_tokens=add))
        self._check_length(len(token_ids))
        return token_ids

    def _rendered(self, chat: Conversation) -> str:
        return self._tokenizer.apply_chat_template(
            chat.messages,
            chat.variables,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
        )

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


class _TextAssembler:
    """The text of one answer, token by token, up to a stop string.

    Attributes:
        finish_reason: why the text ended; None while it goes on.
        stop_reason: see `TextChunk`.
        stopped: a stop string was found; what comes after it is not part of the answer.
        num_tokens: tokens taken.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.stopped = False
        self.num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(
            tokenizer if sampling.skip_special_tokens else tokenizer.with_special_tokens
        )
        self._show_stop = sampling.include_stop_str_in_output
        self._stops = StopStrings(sampling.stop, include=self._show_stop)
        self._stop_token_ids = set(sampling.stop_token_ids).difference(() if sampling.ignore_eos else eos_token_ids)
        self._min_tokens = sampling.min_tokens

    def push(self, tokens: Sequence[TokenOutput]) -> TextChunk:
        """Take tokens up to the one that completes a stop string, and return them with the text that is certain."""
        text = ""
        for position, token in enumerate(tokens):
            self.num_tokens += 1
            self.finish_reason = token.finish_reason
            # The token that ended the text is not part of it, unless that is wanted.
            if token.finish_reason is FinishReason.STOP and token.token_id in self._stop_token_ids:
                self.stop_reason = token.token_id
            if token.finish_reason is not FinishReason.STOP or self._show_stop:
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
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._stops.found
        return kept
