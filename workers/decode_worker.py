"""The decode worker: reserves blocks, has the KV cache arrive whole or computes it, decodes in a continuous batch.

Steps overlap: the next one is launched before the tokens of the one before are looked at, so that the device always
has work. A sequence that turns out to have ended has then run one step too many; that token is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from itertools import chain

from kv_transfer.connector import KVConnector
from workers.errors import BatonError, DeadlineExceededError, HandoffError, NoTokenLeftError, SamplingError
from workers.grammars.compiler import GrammarCompiler
from workers.handoff.receiving import Arrival, RemotePrefill
from workers.handoff.share_exchange import Exchange
from workers.kv_cache.cache_split import default_steps_ahead
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.prefix_cache import PrefixCache
from workers.messages import (
    CacheUpdate,
    DecodeReport,
    FinishReason,
    Load,
    RequestFailed,
    RequestPreempted,
    TokenOutput,
    WorkerEvent,
    WorkerRequest,
)
from workers.request_trace import RequestTrace
from workers.runner.decode_graphs import Progress
from workers.runner.decode_runner import DecodeRunner, Launch
from workers.runner.model_runner import ModelRunner
from workers.runner.step_pace import StepPace
from workers.runner.step_times import StepTimes
from workers.sampling.results import SampledToken
from workers.sampling.state import finish_reason, sample_states
from workers.scheduling.decode_scheduler import DecodeBatch
from workers.scheduling.local_prefill import FirstToken, LocalPrefill
from workers.scheduling.lost_room import LostRoom, no_room
from workers.scheduling.samples import Parting, RequestSequences
from workers.scheduling.sequence import Sequence
from workers.scheduling.sequence_blocks import SequenceBlocks
from workers.scheduling.sequence_spans import note_local_prompt, sequence_spans
from workers.validation import (
    check_capacity,
    check_local,
    check_prompt,
    check_samples,
    check_sampling,
    check_sampling_tokens,
    check_token_ids,
)
from workers.waiting_queue import DecodeQueue

_CANCELLED = "the request was cancelled"


class DecodeWorker:
    """Decodes sequences whose prompts were computed elsewhere, or here. A plain object: `step` as long as `has_work`.

    A request waits for blocks, then for its KV cache, then runs. Memory grows on demand: when no block is left, the
    newest sequence makes room by moving its blocks to host memory, and comes back before anything new is admitted.

    Attributes:
        decoder: runs its steps.
        cache: which blocks belong to whom.

    Args:
        runner: the model and its cache.
        connector: with the cache registered.
        max_num_seqs: sequences in the batch.
        max_model_len: context window, tokens.
        max_num_batched_tokens: prompt tokens that are computed beside a decode step at most; None: prompts are computed
            elsewhere only.
        steps_ahead: how many steps may be in flight while the next is launched; None: one on a GPU, and none on a
            CPU, where launching a step computes it.
        enforce_eager: use no CUDA graphs.
        enable_prefix_caching: keep full blocks for prompts that begin with what they hold.
        grammars: compiles what requests ask for; None refuses it.
        exchange: completes what ranks are sent shares of; None: each is sent all that it keeps.
        progress: told how many of the CUDA graphs are captured, and how many there will be.
        clock: what time it is, in monotonic seconds.
    """

    def __init__(
        self,
        runner: ModelRunner,
        connector: KVConnector,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int | None = None,
        steps_ahead: int | None = None,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        grammars: GrammarCompiler | None = None,
        exchange: Exchange | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self.decoder = DecodeRunner[Sequence](
            runner,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            state_of=lambda sequence: sequence.state,
            enforce_eager=enforce_eager,
            progress=progress,
        )
        self._steps_ahead = default_steps_ahead(runner.device) if steps_ahead is None else steps_ahead
        self._launches: deque[Launch[Sequence]] = deque()
        self.step_times = StepTimes()
        self._pace = StepPace(clock)
        self._connector = connector
        self._grammars = grammars or GrammarCompiler.without_vocabulary()
        self.cache = KVCacheManager(
            runner.groups,
            runner.num_blocks,
            prompt_tokens_in_flight=(self._steps_ahead + 1) * (max_num_batched_tokens or 1),
            decode_tokens_in_flight=self._steps_ahead + 1,
        )
        self._kept = SequenceBlocks(self.cache, enabled=enable_prefix_caching)
        self._batch = DecodeBatch(self.cache, runner, max_num_seqs)
        self._parting = Parting(self.cache, runner, self._batch)
        self._remote = RemotePrefill(connector, self.cache, self._kept, exchange)
        self._local = LocalPrefill(
            runner,
            self.cache,
            max_num_batched_tokens=max_num_batched_tokens or 0,
            max_num_seqs=max_num_seqs,
            clock=clock,
        )
        self._queue = DecodeQueue(self._batch, self._remote, self._local)
        self._computes_prompts = max_num_batched_tokens is not None
        self._max_model_len = max_model_len
        self._sequences = RequestSequences()
        self._lost_room: LostRoom[Sequence] = LostRoom(self.cache, clock)
        self._events: list[WorkerEvent] = []

    def add(self, request: WorkerRequest) -> None:
        """Queue a request for blocks. One that is wrong or can never fit ends in `RequestFailed`."""
        num_tokens, num_samples = len(request.prompt_token_ids), request.sampling.n
        config, is_local = self._runner.model.config, request.peer_engine is None
        try:
            check_prompt(num_tokens, request.sampling, self._max_model_len)
            check_samples(num_samples, self._batch.max_num_seqs)
            check_capacity(self.cache, num_tokens + 1, "decode", computed=is_local, samples=num_samples)
            check_token_ids(request.prompt_token_ids, config.vocab_size)
            check_sampling(request.sampling, config.eos_token_ids, config.vocab_size)
            check_local(is_local, self._computes_prompts)
            check_sampling_tokens(request.sampling, self._runner.model.config.vocab_size)
            matchers = [self._grammars.matcher(request.sampling.structured_output) for _ in range(num_samples)]
        except BatonError as error:
            self._events.append(RequestFailed(request.request_id, error, attempt_id=request.attempt_id))
            return
        state, *others = sample_states(request, config.eos_token_ids, self._max_model_len, matchers)
        now = self._clock()
        sequence = Sequence(
            request,
            state,
            deadline=now + request.timeout_s,
            arrived=now,
            trace=RequestTrace.of(request),
            others=others,
        )
        self._kept.begin(sequence)
        self._sequences.add(sequence)
        self._queue.add(sequence)

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """Stop an attempt, wherever it is, or one of its samples; if it is traced its spans are told."""
        if index is None:
            for sequence in self._sequences.pop(attempt_id):
                self._stop(sequence, _CANCELLED)
            return
        for sequence in self._sequences.of(attempt_id):
            if sequence in self._queue:  # it has not parted: all samples are this one
                sequence.unwanted.add(index)
            elif sequence.index == index:
                self._sequences.remove(sequence)
                self._stop(sequence, _CANCELLED)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """A prefill worker's process is gone."""
        self._connector.disconnect(engine_id, confirmed_dead)

    def take_cache_update(self) -> CacheUpdate | None:
        """How the content of the kept blocks has changed since the last call; None: not at all."""
        return self.cache.take_update()

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        return (
            self._batch.size > 0
            or bool(self._launches)
            or self._local.has_work
            or self._batch.can_resume
            or bool(self._events)
            or self._queue.can_admit
        )

    @property
    def has_requests(self) -> bool:
        """Whether anything is under way, or blocks are held for someone who might still write to them."""
        return bool(self._sequences) or bool(self._launches) or self._remote.in_flight or self._local.in_flight

    @property
    def runner(self) -> ModelRunner:
        """The model and its cache."""
        return self._runner

    @property
    def blocks(self) -> PrefixCache:
        """The blocks of its primary cache group: free, in use, or kept for what is in them."""
        return self.cache.primary_pool

    @property
    def block_tables(self) -> tuple[tuple[int, ...], ...]:
        """The blocks of everybody who holds some, those that are computed, expected or still written to included.

        Those of the primary cache group.
        """
        in_flight = {sequence for launch in self._launches for sequence in launch.sequences}
        decoded = in_flight.union(self._batch.running, self._remote.expected)
        return (*(tuple(self.cache.held(sequence.tables)) for sequence in decoded), *self._local.block_tables)

    @property
    def num_in_flight(self) -> int:
        """Decode steps that are launched, and whose tokens have not been looked at."""
        return len(self._launches)

    @property
    def num_computing(self) -> int:
        """Prompts that are computed here: they have blocks, and no first token yet."""
        return self._local.num_admitted

    @property
    def running_requests(self) -> tuple[str, ...]:
        """Those in the batch, oldest first."""
        return tuple(sequence.request.request_id for sequence in self._batch.running)

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """Engine ids to which the connection is broken; see `KVConnector.broken_peers`."""
        return self._connector.broken_peers

    @property
    def load(self) -> Load:
        """The load now."""
        return Load(
            total_blocks=self.cache.num_blocks,
            free_blocks=self.cache.num_free,
            reserved_blocks=self._remote.num_reserved_blocks,
            quarantined_blocks=self._remote.num_quarantined_blocks,
            running=self._batch.size,
            waiting=self._queue.size,
            waiting_tokens=self._queue.num_tokens,
            preempted=self._batch.num_preempted,
            decode_pace=self._pace.ratio,
        )

    def step(self) -> list[WorkerEvent]:
        """Do what is due: arrivals, deadlines, reservations, the launch of the next step, tokens of an earlier one."""
        for arrival in self._remote.poll():
            self._join(arrival)
        self._enforce_deadlines()
        self._send_away()
        self._batch.resume_preempted()
        self._queue.admit()
        self._run()
        events, self._events = self._events, []
        return events

    def _run(self) -> None:
        """Launch a chunk of the prompts that are computed here and a decode step; take what earlier ones have done.

        In this order nobody's token waits for work that was launched after it. Tokens that depend on those of the step
        before, as under a grammar, are chosen when these are known: the device is at the forward pass meanwhile.
        """
        if self._launches and (self._steps_ahead == 0 or self._batch.lacks_blocks):
            self._collect(0)
        launched = self._local.launch()
        if batch := self._batch.schedule():
            self._pace.launched(0.0 if launched else self._predicted_s(batch))
            self._launches.append(self.decoder.launch(batch))
            self._batch.launched(batch)
        for sequence in self._batch.take_preempted():
            request = sequence.request
            self._events.append(RequestPreempted(request.request_id, attempt_id=request.attempt_id))
            if sequence.trace is not None:
                sequence.trace.event("preempted")
        self._collect(self._steps_ahead if batch else 0)
        self._choose()
        more = batch or self._local.can_launch
        for first in self._local.collect(self._steps_ahead if launched and more else 0):
            self._accept_first(first)

    def _predicted_s(self, batch: list[Sequence]) -> float:
        """How long a decode step takes, by what was measured."""
        return self.step_times.decode_seconds(len(batch), sum(sequence.num_scheduled for sequence in batch))

    def _collect(self, ahead: int) -> None:
        """Take the tokens of the oldest launches, until only `ahead` are left in flight."""
        while len(self._launches) > ahead:
            launch = self._launches.popleft()
            sampled = launch.sampled.tokens([sequence.state for sequence in launch.sequences])
            self._pace.landed()
            now = self._clock()
            for sequence, token in zip(launch.sequences, sampled, strict=True):
                if self._batch.landed(sequence):
                    self._accept(sequence, token, now)

    def _choose(self) -> None:
        """Have the last launch's tokens chosen, if that waits for those before them."""
        if self._launches and not self._launches[-1].chosen:
            self._collect(1)
            _ = self._launches[-1].sampled

    def _accept(self, sequence: Sequence, sampled: SampledToken | SamplingError, now: float) -> None:
        """A sequence has one more token, or none can be chosen for it."""
        request_id, attempt_id = sequence.request.request_id, sequence.request.attempt_id
        output_token_ids = sequence.state.output_token_ids
        if isinstance(sampled, SamplingError):
            self._events.append(RequestFailed(request_id, sampled, attempt_id=attempt_id))
            self._forget(sequence, sampled)
            self.abort(attempt_id)
            return
        output_token_ids.append(sampled.token_id)
        self._kept.grown(sequence)
        if sequence.tells_decode and len(output_token_ids) == sequence.request.num_output_tokens + 2:
            cached_tokens = self._kept.cached_tokens(sequence)
            first_decode_s = now - sequence.received
            self._events.append(DecodeReport(request_id, first_decode_s, cached_tokens, attempt_id=attempt_id))
            if sequence.trace is not None:
                sequence.trace.mark("second")
        reason = finish_reason(sequence.state)
        if reason is not None:
            self._tell_spans(sequence)
        self._events.append(TokenOutput(request_id, *sampled, reason, sequence.index, attempt_id=attempt_id))
        if reason is not None:
            self._batch.remove(sequence)
            self._sequences.remove(sequence)

    def _forget(self, sequence: Sequence, why: SamplingError) -> None:
        """Keep nothing of a sequence whose logits are not in order; what was only asked for too much is right."""
        if not isinstance(why, NoTokenLeftError):
            self._kept.forget(sequence)

    def _accept_first(self, first: FirstToken) -> None:
        """A prompt that was computed here has its first tokens, or none can be chosen for it."""
        sequence, sampled = first.sequence, first.sampled
        request_id, attempt_id = sequence.request.request_id, sequence.request.attempt_id
        if isinstance(sampled, SamplingError):
            self._events.append(RequestFailed(request_id, sampled, attempt_id=attempt_id))
            self._forget(sequence, sampled)
            self.cache.release(sequence.tables)
            self._sequences.remove(sequence)
            self._tell_spans(sequence, str(sampled))
            return
        trace = sequence.trace
        reasons = self._begin(sequence, [token.token_id for token in sampled])
        if trace is not None:
            note_local_prompt(trace, first.report)
            if all(reason is not None for reason in reasons):
                self._events.append(sequence_spans(sequence, trace))
        self._events.append(first.report)
        if first.logprobs is not None:
            self._events.append(first.logprobs)
        self._events += [
            TokenOutput(request_id, *token, reason, index, attempt_id=attempt_id)
            for index, (token, reason) in enumerate(zip(sampled, reasons, strict=True))
            if index not in sequence.unwanted
        ]

    def _join(self, arrival: Arrival) -> None:
        """The KV cache has come whole: the sequence goes on where prefill left it. Or it will not come."""
        sequence, first_tokens = arrival.sequence, arrival.first_tokens
        if not isinstance(first_tokens, HandoffError) and (wrong := self._wrong_tokens(sequence, first_tokens)):
            self.cache.release(sequence.tables)
            first_tokens = HandoffError(wrong)
        if isinstance(first_tokens, HandoffError):
            self._sequences.remove(sequence)
            attempt_id = sequence.request.attempt_id
            self._tell_spans(sequence, str(first_tokens))
            self._events.append(RequestFailed(sequence.request.request_id, first_tokens, attempt_id=attempt_id))
        else:
            self._begin(sequence, first_tokens)

    def _wrong_tokens(self, sequence: Sequence, first_tokens: Many[int]) -> str | None:
        """Why a sequence cannot go on with what its prefill worker has said; None: it can."""
        if len(first_tokens) != sequence.num_samples:
            return f"{len(first_tokens)} first tokens came for {sequence.num_samples} samples"
        vocab_size = self._runner.model.config.vocab_size
        if (largest := max(first_tokens)) >= vocab_size:
            return f"the first token is {largest}, the vocabulary has {vocab_size}"
        return None

    def _begin(self, sequence: Sequence, first_tokens: Many[int]) -> list[FinishReason | None]:
        """The KV cache is whole and the first tokens known: decode every sample that its own does not end."""
        going_on, reasons = self._parting.begin(sequence, first_tokens, self._clock())
        if sequence.trace is not None:
            sequence.trace.mark("received")
            if going_on and going_on[0] is not sequence:  # one that goes on tells when what happened
                going_on[0].trace, sequence.trace = sequence.trace, None
        self._sequences.remove(sequence)
        for each in going_on:
            self._sequences.add(each)
        return reasons

    def _enforce_deadlines(self) -> None:
        for sequences in self._sequences.overdue(self._clock()):
            request = sequences[0].request
            where = "decoding"
            if sequences[0] in self._queue:
                is_local = request.peer_engine is None
                where = "waiting for or computing its prompt" if is_local else "waiting for the KV cache"
            error = DeadlineExceededError(f"the deadline passed while {where}")
            self._events.append(RequestFailed(request.request_id, error, attempt_id=request.attempt_id))
            for sequence in sequences:
                self._stop(sequence, str(error))

    def _send_away(self) -> None:
        """Fail those for whom there will be no room here: they may go on elsewhere, and hold nobody up."""
        quarantined = self._remote.quarantined
        for sequence in self._lost_room.find(quarantined, lambda: chain(self._batch.needs(), self._queue.needs())):
            request = sequence.request
            error = no_room(quarantined[self.cache.primary], self.cache.num_blocks)
            stopped = self._sequences.pop(request.attempt_id)
            if stopped:  # its other samples are not told of
                self._events.append(RequestFailed(request.request_id, error, attempt_id=request.attempt_id))
            for each in stopped:
                self._stop(each, str(error))

    def _stop(self, sequence: Sequence, reason: str) -> None:
        """End a sequence that is no longer in `_sequences`; its blocks follow when they are safe."""
        self._tell_spans(sequence, reason)
        if sequence in self._queue:
            self._queue.remove(sequence)
        else:
            self._batch.remove(sequence)

    def _tell_spans(self, sequence: Sequence, stopped: str = "") -> None:
        """The sequence has ended, or is stopped for this reason: say when what happened, if it is traced."""
        if sequence.trace is not None:
            self._events.append(sequence_spans(sequence, sequence.trace, stopped))
