"""From a prompt to a stream of text: what stands between a server and the engine, whatever the wire format.

Validate, tokenise, run the engine, detokenise, look for stop strings, count.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster import trace_context
from cluster.api import Engine, EngineRequest, Explanation, ModelInfo
from cluster.caller import current_caller
from cluster.conversation.registry import NO_FORMATS, Formats
from cluster.errors import ModelNotFoundError
from cluster.generation.answer import Answer, Parts
from cluster.generation.complete_sampling import complete_sampling, obliged
from cluster.generation.conversations import Conversation, Conversations
from cluster.generation.grammar_check import GrammarCheck
from cluster.generation.intake import Intake
from cluster.generation.prompt_encoder import Prompt, PromptEncoder, prompt_bytes
from cluster.generation.prompt_positions import PromptPosition, prompt_positions
from cluster.generation.restrictions import Restrictions
from cluster.generation.rewritten_parts import Copied, TakenApart
from cluster.generation.text_assembler import TextAssembler
from cluster.generation.text_chunk import TextChunk
from cluster.request_id import clean_request_id
from cluster.routing.prefix_index import PromptPrefix
from cluster.text.tokenizer import Tokenizer
from workers.errors import DeadlineExceededError, InvalidRequestError
from workers.messages import PromptLogprobs, RequestOptions, shared_options
from workers.token_ids import TokenIds
from workers.validation import check_token_ids

DEFAULT_MAX_N = 64
_LONGEST_SHOWN = 128
_SCORED_BYTES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest(RequestOptions):
    """What a client asks for. An empty `model` accepts the served one.

    `add_special_tokens`: begin (or end) the prompt with what the checkpoint's tokenizer adds; None: a text, and not a
    conversation, whose template writes it. `gathered`: answers that are sent in one piece together with this one, its
    own samples included; 0: each part is sent when it is there.
    """

    prompt: Prompt
    model: str = ""
    add_special_tokens: bool | None = None
    gathered: int = 0


class Generation:
    """Generates text with one model.

    Args:
        engine: runs token ids.
        tokenizer: of the served checkpoint.
        model_info: the served model's name and limits.
        sampling_defaults: of what a request's sampling leaves open, by name.
        grammars: says which ones its workers can compile; None: no structured output is taken.
        formats: how the model writes tool calls and reasoning.
        max_n: samples of one request at most.

    Attributes:
        sampling_defaults: the same, for the doors.
        intake: where long work on requests is done, that of the doors too.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model_info: ModelInfo,
        sampling_defaults: Mapping[str, Any] | None = None,
        grammars: GrammarCheck | None = None,
        formats: Formats = NO_FORMATS,
        max_n: int = DEFAULT_MAX_N,
    ) -> None:
        self.sampling_defaults = dict(sampling_defaults or {})
        self._max_n = max_n
        self._engine = engine
        self._tokenizer = tokenizer
        self._conversations = Conversations(tokenizer, formats)
        self._model = model_info
        self._encoder = PromptEncoder(tokenizer, self._conversations, model_info)
        self.intake = Intake()
        self._restrictions = Restrictions(grammars, tokenizer, model_info.vocab_size, self.intake)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextChunk, None]:
        """Run one request. Closing the generator cancels it.

        Raises:
            InvalidRequestError: the request is wrong; nothing was started.
            BatonError: what the engine raises.
        """
        async with aclosing(await self.start(request)) as parts:
            async for part in parts:
                yield part

    async def start(self, request: GenerationRequest) -> Parts:
        """The same as parts that may be polled, too; they are to be closed.

        Raises:
            InvalidRequestError: the request is wrong; nothing was started.
        """
        chat = request.prompt if isinstance(request.prompt, Conversation) else None
        return self.run(await self.prepare(request), chat)

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
        return replace(engine_request, timeout_s=timeout_s, received=arrival)

    def run(self, engine_request: EngineRequest, chat: Conversation | None = None) -> Parts:
        """Run what `prepare` has made, of this conversation if it was one. Closing the parts cancels it.

        Raises:
            BatonError: from the parts, what the engine raises.
        """
        sampling, prompt, copies = engine_request.sampling, engine_request.prompt_token_ids, engine_request.copies
        markers = self._conversations.marker_ids if sampling.skip_special_tokens else {}
        assembler = partial(TextAssembler, self._tokenizer, sampling, prompt, self._model.eos_token_ids, markers)
        texts = {index: assembler() for index in range(sampling.n)}
        positions = partial(self._positions, prompt)
        parts: Parts = Answer(self._engine.generate(engine_request), texts, len(prompt), positions)
        if copies > 1:
            parts = Copied(parts, copies)
        if chat is None:
            return parts
        reader = partial(
            self._conversations.reader, chat, prompt, shows_special_tokens=not sampling.skip_special_tokens
        )
        readers = [reader() for _ in range(max(sampling.n, copies))]
        return TakenApart(parts, [each for each in readers if each is not None]) if readers[0] else parts

    async def _positions(self, prompt: TokenIds, logprobs: PromptLogprobs) -> tuple[PromptPosition, ...]:
        size = _SCORED_BYTES * logprobs.top_token_ids.size
        return await self.intake.call(size, prompt_positions, prompt, logprobs, self.token_text)

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
        return await self.intake.call(prompt_bytes(prompt), self._encoder.token_ids, prompt, add_special_tokens)

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
        return await self.intake.call(
            token_ids.nbytes, lambda: self._tokenizer.with_special_tokens.text_of(token_ids.tolist())
        )

    async def _engine_request(self, request: GenerationRequest) -> EngineRequest:
        """The one request that goes from here to the workers, checked and whole; long work is done on other threads.

        Raises:
            InvalidRequestError: the request is wrong.
        """
        self._check_model(request.model)
        caller = current_caller()
        caller.tenant.check_priority(request.priority)
        salt = caller.tenant.salt(request.cache_salt)
        request = replace(request, cache_salt=salt, cache_owner=caller.client)
        sampling = await self._restrictions.resolve(request.sampling)
        num_bytes = prompt_bytes(request.prompt)
        prompt, prefix = await self.intake.call(num_bytes, self._hashed, request)
        if isinstance(request.prompt, Conversation) and request.prompt.tool_use is not None:
            grammar = await self.intake.call(num_bytes, self._conversations.call_grammar, request.prompt, prompt)
            if grammar is not None:
                sampling = await self._restrictions.resolve(obliged(sampling, grammar))
        options = shared_options(request)
        if not request.traceparent:
            options["traceparent"], options["tracestate"] = trace_context.get()
        options["request_id"] = clean_request_id(request.request_id)
        special = self._tokenizer.special_token_ids
        options["sampling"] = await self.intake.call(
            sum(map(len, sampling.stop)) * len(special),  # each is looked for in each
            partial(complete_sampling, sampling, len(prompt), self._model, special, self._max_n, request.gathered),
        )
        copies = 1
        if options["sampling"].greedy:
            copies, options["sampling"] = options["sampling"].n, replace(options["sampling"], n=1)
        return EngineRequest(**options, prompt_token_ids=prompt, prefix=prefix, copies=copies, caller=caller)

    def _hashed(self, request: GenerationRequest) -> tuple[TokenIds, PromptPrefix]:
        """A prompt's token ids, and its blocks as prefix caches are asked for them."""
        token_ids = self._encoder.token_ids(request.prompt, request.add_special_tokens)
        prefix = PromptPrefix(token_ids, self._engine.cache_identity + request.cache_salt)
        prefix.prepare(self._engine.block_sizes)
        return token_ids, prefix

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text, its first space included; special tokens add nothing."""
        return self._tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special ones as they are spelled."""
        return self._tokenizer.token_bytes(token_id)

    def token_name(self, token_id: int) -> str:
        """A token as the checkpoint spells it."""
        return self._tokenizer.token_name(token_id)

    async def text_of(self, token_ids: TokenIds) -> str:
        """The text of a prompt that was given as token ids; special tokens have none."""
        return await self.intake.call(token_ids.nbytes, lambda: self._tokenizer.text_of(token_ids.tolist()))

    def _check_model(self, model: str) -> None:
        if model and model != self._model.name:
            raise ModelNotFoundError(
                f"model {model[:_LONGEST_SHOWN]!r} is not served here; this server serves {self._model.name!r}"
            )
