"""One attempt at a request: what its workers have said so far, put in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.api import RequestReport, TokenChunk
from cluster.caller import NOBODY, Caller
from cluster.clock import now
from workers.errors import HandoffError
from workers.messages import (
    DecodeReport,
    FinishReason,
    HandoffReport,
    PrefillReport,
    PromptLogprobs,
    RequestFailed,
    TokenOutput,
    WorkerEvent,
)

_CAUSE_PATIENCE_S = 0.05


@dataclass(eq=False)
class Attempt:
    """Where a request is, and what has come of it.

    The two workers' streams are independent, so that a decoded token can overtake the first one, which prefill sampled:
    it is held until that has come. Where the decode worker computes the prompt itself, all tokens are in one stream.
    An attempt may have several samples, each with a first token of its own.

    Attributes:
        attempt_id: its name on its workers.
        prefill: engine id; empty when the decode worker computes the prompt.
        decode: engine id; empty when there is nothing to decode.
        num_prompt: tokens of the prompt.
        arrived: when the request came, monotonic time.
        attempts: this one included.
        user: whose request it is.
        caller: who made the call.
        request_id: the client's name for the request.
        num_samples: answers to the prompt.
        dispatched: when its workers were sent the request.
        first_token_at: when the first token came; 0 before.
        last_token_at: when the last token came that is in order; 0 before the first.
        num_output: tokens of all samples so far.
        ended_after: tokens of the sample that ended last.
        last_gap_s: from a sample's token before to the last one that came; None: that was its first.
        prompt_logprobs: those of the prompt; None: they have not come, or nobody asks.
        finished: the last token of every sample is here.
        error: why the attempt failed.
        traced: whether its workers are to say when what happened.
        output_before: tokens that earlier attempts have generated, which are part of its prompt.
        finish_reason: why the text ended, once it has.
        first_report: of the attempt that had the request's first token, if that was another one.
        account: whom its tokens are charged to: its user, the caller's tenant and share.
        reader: called when there are tokens for which `next_chunk` waits, and which it may `poll`; None: who waits is
            woken.
    """

    attempt_id: str
    prefill: str
    decode: str
    num_prompt: int
    arrived: float
    attempts: int
    user: str = ""
    request_id: str = ""
    num_samples: int = 1
    caller: Caller = NOBODY
    dispatched: float = field(default_factory=now)
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    num_output: int = 0
    ended_after: int = 0
    last_gap_s: float | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finished: bool = False
    _running: dict[int, _Sample] = field(default_factory=dict)
    _held: list[TokenOutput] = field(default_factory=list)
    _ready: list[TokenOutput] = field(default_factory=list)
    error: Exception | None = None
    traced: bool = False
    output_before: int = 0
    finish_reason: FinishReason | None = None
    account: tuple[str, str, float] = field(init=False)
    first_report: RequestReport | None = None
    reader: Callable[[], None] | None = None
    _may_be_polled: bool = False
    """Whether `next_chunk` waits, and is not wanted for more than tokens that can be polled."""
    _woken: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _prefill_report: PrefillReport | None = None
    _handoff_report: HandoffReport | None = None
    _decode_report: DecodeReport | None = None
    _handoff_reported: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._running = {index: _Sample() for index in range(self.num_samples)}
        self.account = (self.user, self.caller.client, self.caller.share)
        if not self.prefill:  # there is no handoff to hear of
            self._handoff_reported.set()

    def take(self, engine_id: str, event: WorkerEvent) -> None:
        """Something that one of the workers said."""
        match event:
            case TokenOutput():
                self.take_token(engine_id, event, now())
                self.tell()
            case PromptLogprobs():
                self.prompt_logprobs = event
                self._may_be_polled = False
            case PrefillReport():
                self._prefill_report = event
            case HandoffReport():
                self._handoff_report = event
                self._handoff_reported.set()
            case DecodeReport():
                self._decode_report = event
            case RequestFailed(_, HandoffError() as error) if engine_id == self.decode:
                # Decode knows only that the handoff ended; if prefill ended it, prefill says why.
                asyncio.get_running_loop().call_later(_CAUSE_PATIENCE_S, self.fail, error)
            case RequestFailed(_, error):
                self.fail(error)

    def falls_with(self, engine_id: str) -> bool:
        """Whether it is over if this worker is gone. A prefill worker whose part is done is not missed.

        If the first token is out and the handoff undecided, the decode worker knows whether the cache is whole: it goes
        on, or says that the handoff failed.
        """
        if self.finished or self.error is not None:
            return False
        return engine_id == self.decode or (engine_id == self.prefill and not self.first_token_at)

    def needs(self, engine_id: str) -> bool:
        """Whether it could not go on to its end without this worker."""
        if self.error is not None:
            return False
        if engine_id == self.decode:
            return not self.finished
        return engine_id == self.prefill and not (self.first_token_at and self.reported)

    def fail(self, error: Exception) -> None:
        """End with an error, after the tokens that are here."""
        if not self.finished and self.error is None:
            self.error = error
            self._call()

    async def next_chunk(self) -> TokenChunk:
        """The tokens that have come since the last call, at least one; none after `wake`.

        Raises:
            Exception: what `fail` was given.
        """
        while not self._ready and not self._woken:
            if self.error is not None:
                raise self.error
            self._news.clear()
            self._may_be_polled = self.reader is not None and self.prompt_logprobs is None
            try:
                await self._news.wait()
            finally:
                self._may_be_polled = False
        self._woken = False
        tokens, self._ready = tuple(self._ready), []
        logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return TokenChunk(tokens, logprobs)

    def poll(self) -> tuple[TokenOutput, ...]:
        """The tokens for which `next_chunk` waits, which goes on waiting; none where it is to return or raise.

        So tokens and all that is more, the last token, log-probabilities of the prompt and errors, stay in order.
        """
        if not self._ready or not self._may_be_polled:
            return ()
        tokens, self._ready = tuple(self._ready), []
        return tokens

    def _call(self) -> None:
        """Have `next_chunk` look."""
        self._may_be_polled = False
        self._news.set()

    def wake(self) -> None:
        """Have `next_chunk` return, with or without tokens."""
        self._woken = True
        self._call()

    def tell(self) -> None:
        """Whoever reads may look: `take_token` has taken some."""
        if self.reader is None or not self._may_be_polled:
            self._call()
            return
        try:
            self.reader()
        except Exception as error:  # of one reader, which is not to end all that its worker says
            self.fail(error)

    @property
    def num_running(self) -> int:
        """Samples whose last token is not here."""
        return len(self._running)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, of the longest sample that runs, for the books; of the last one, if none does."""
        return self.num_prompt + max([sample.num_tokens for sample in self._running.values()], default=self.ended_after)

    def drop(self, index: int) -> None:
        """Nobody wants the rest of a sample, which is not the last one that runs."""
        if len(self._running) > 1:
            self._running.pop(index, None)
            self._held = [token for token in self._held if token.index != index]
            self._ready = [token for token in self._ready if token.index != index]

    def serve_alone(self) -> None:
        """The prefill worker's one token is all that is wanted: there is no handoff to hear of."""
        self.decode = ""
        self._handoff_reported.set()

    @property
    def reported(self) -> bool:
        """Whether nothing more is to be heard of the handoff."""
        return self._handoff_reported.is_set()

    async def handoff_reported(self, patience_s: float) -> None:
        """Give the handoff's report, which may come after the last token, a moment to arrive."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._handoff_reported.wait(), patience_s)

    def report(self) -> RequestReport:
        """Where the time went, as far as it is known."""
        prefill, handoff, decode = self._prefill_report, self._handoff_report, self._decode_report
        report = RequestReport(
            prefill_worker=self.prefill,
            decode_worker=self.decode,
            queue_s=self.dispatched - self.arrived + (prefill.queue_s if prefill else 0.0),
            prefill_s=prefill.prefill_s if prefill else 0.0,
            ttft_s=max(0.0, self.first_token_at - self.arrived),
            transfer_s=handoff.transfer_s if handoff else 0.0,
            exposed_transfer_s=handoff.exposed_s if handoff else 0.0,
            first_decode_s=decode.first_decode_s if decode else 0.0,
            kv_bytes=handoff.num_bytes if handoff else 0,
            attempts=self.attempts,
            cached_tokens=prefill.cached_tokens if prefill else 0,
            decode_cached_tokens=decode.cached_tokens if decode else 0,
        )
        first = self.first_report
        if first is None:
            return report
        return replace(report, queue_s=first.queue_s, prefill_s=first.prefill_s, ttft_s=first.ttft_s)

    def take_token(self, engine_id: str, token: TokenOutput, at: float) -> int:
        """A token that has come at this time; `tell` is to be called when all that came with it are taken.

        Returns:
            How many more tokens are in order.
        """
        sample = self._running.get(token.index)
        if sample is None:  # dropped
            return 0
        if sample.last_at:
            count, last = 1, token
            self._ready.append(token)
            self.last_gap_s = at - sample.last_at
        else:
            if engine_id == self.decode and self.prefill:
                self._held.append(token)
                return 0
            tokens = [token, *(held for held in self._held if held.index == token.index)]
            self._held = [held for held in self._held if held.index != token.index]
            count, last = len(tokens), tokens[-1]
            self._ready += tokens
            self.last_gap_s = None
            self.first_token_at = self.first_token_at or at
        self.last_token_at = sample.last_at = at
        sample.num_tokens += count
        self.num_output += count
        if last.finish_reason is not None:
            del self._running[token.index]
            self.ended_after = sample.num_tokens
            self.finish_reason = last.finish_reason
            if not self._running:
                self.finished, self._may_be_polled = True, False
        return count


@dataclass(slots=True)
class _Sample:
    """How far a sample is: its tokens, and when the last one came; 0 before the first."""

    num_tokens: int = 0
    last_at: float = 0.0
