"""The prefill worker: computes prompts, samples the first token, pushes the KV cache while it computes.

Steps overlap while prompts wait: the next one is launched before the first tokens of the one before are looked at, so
that the device always has work. A step with nothing behind it is waited for at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from kv_transfer.connector import ConnectorEvent, HandoffAborted, HandoffSent, KVConnector
from workers.errors import BatonError, HandoffError, NoTokenLeftError, SamplingError
from workers.grammars.compiler import GrammarCompiler
from workers.handoff.layers_per_write import LayersPerWrite
from workers.handoff.prompt_spans import prompt_spans, stopped_prompt_spans
from workers.handoff.sending import Prompt, complete_blocks, layer_pusher, push_cached
from workers.kv_cache.cache_split import default_steps_ahead
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.prefix_cache import PrefixCache
from workers.messages import (
    CacheUpdate,
    HandoffReport,
    Load,
    PrefillReport,
    RequestFailed,
    TokenOutput,
    WorkerEvent,
    WorkerRequest,
)
from workers.runner.model_runner import ModelRunner
from workers.runner.prefill_graphs import Progress
from workers.runner.step_pace import StepPace
from workers.runner.step_times import StepTimes
from workers.sampling.results import SampledToken
from workers.sampling.state import finish_reason
from workers.scheduling.lost_room import LostRoom, no_room
from workers.scheduling.prefill_scheduler import Chunk, PrefillScheduler
from workers.scheduling.prefill_step import Launch, launch_chunks
from workers.validation import check_capacity, check_prompt, check_sampling, check_sampling_tokens, check_token_ids


class PrefillWorker:
    """Computes prompts in chunks. A plain object: its owner calls `step` as long as `has_work`.

    Attributes:
        cache: which blocks belong to whom.

    Args:
        runner: the model and its cache.
        connector: with the cache registered.
        max_num_batched_tokens: token budget of a step.
        max_num_seqs: prompts in a step.
        max_model_len: context window, tokens.
        layers_per_write: layers that one WRITE carries; None chooses for every prompt and path.
        handoff_timeout_s: how long after the first token the cache may take to arrive.
        steps_ahead: how many steps may be in flight while the next is launched; None: one on a GPU, and none on a
            CPU, where launching a step computes it.
        enforce_eager: use no CUDA graphs.
        enable_prefix_caching: keep the blocks of prompts for those that begin alike.
        grammars: compiles what requests ask for; None refuses it.
        progress: told how many of the CUDA graphs are captured, and how many there will be.
        clock: what time it is, in monotonic seconds.
    """

    def __init__(
        self,
        runner: ModelRunner,
        connector: KVConnector,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        layers_per_write: int | None = None,
        handoff_timeout_s: float = 30.0,
        steps_ahead: int | None = None,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        grammars: GrammarCompiler | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        if not enforce_eager:
            runner.capture_prefill(min(max_num_batched_tokens, max_model_len), progress)
        self._clock = clock
        self._connector = connector
        self._grammars = grammars or GrammarCompiler.without_vocabulary()
        self._steps_ahead = default_steps_ahead(runner.device) if steps_ahead is None else steps_ahead
        self.cache = KVCacheManager(
            runner.groups,
            runner.num_blocks,
            prompt_tokens_in_flight=(self._steps_ahead + 1) * max_num_batched_tokens,
        )
        self._scheduler = PrefillScheduler(self.cache, max_num_batched_tokens, max_num_seqs)
        self._cached_block_size = self.cache.block_size if enable_prefix_caching else None
        self._max_model_len = max_model_len
        share_after_attention = runner.model.config.share_after_attention
        self.layers_per_write = LayersPerWrite(connector, runner.groups, layers_per_write, share_after_attention)
        self._handoff_timeout_s = handoff_timeout_s
        self._launches: deque[Launch[Prompt]] = deque()
        self.step_times = StepTimes()
        self._pace = StepPace(clock)
        self._prompts: dict[str, Prompt] = {}
        self._handoffs: dict[bytes, Prompt] = {}
        self._lost_room: LostRoom[str] = LostRoom(self.cache, clock)
        self._events: list[WorkerEvent] = []

    def add(self, request: WorkerRequest) -> None:
        """Queue a prompt. One that is wrong or can never fit ends in `RequestFailed`."""
        num_tokens, config = len(request.prompt_token_ids), self._runner.model.config
        try:
            check_prompt(num_tokens, request.sampling, self._max_model_len)
            check_token_ids(request.prompt_token_ids, config.vocab_size)
            check_sampling(request.sampling, config.eos_token_ids, config.vocab_size)
            check_capacity(self.cache, num_tokens, "prefill", computed=True)
            check_sampling_tokens(request.sampling, self._runner.model.config.vocab_size)
            structured = request.sampling.structured_output
            matchers = [self._grammars.matcher(structured) for _ in range(request.sampling.n)]
        except BatonError as error:
            self._events.append(RequestFailed(request.request_id, error, attempt_id=request.attempt_id))
            return
        block_size = self._cached_block_size
        prompt = Prompt.of(request, config.eos_token_ids, self._max_model_len, self._clock(), block_size, matchers)
        self._prompts[request.attempt_id] = prompt
        self._scheduler.add(prompt.progress)
        if request.peer_engine is not None:
            self._handoffs[request.handoff_id] = prompt
            self._connector.begin(request.handoff_id, request.peer_engine)

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """Stop an attempt, wherever it is, and tell its spans if it is traced. Of one sample nothing is stopped."""
        if index is None and (prompt := self._prompts.pop(attempt_id, None)):
            self._stop(prompt, "the request was cancelled")

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """A decode worker's process is gone."""
        self._connector.disconnect(engine_id, confirmed_dead)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        return self._scheduler.can_schedule or bool(self._launches) or bool(self._events)

    @property
    def has_requests(self) -> bool:
        """Whether anything is under way, on this worker or in flight from it."""
        return bool(self._prompts) or bool(self._handoffs) or bool(self._launches)

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
        """The blocks of every prompt that holds some, those that are handed over or still written to included.

        Those of the primary cache group.
        """
        in_flight = {prompt for launch in self._launches for prompt in launch.prompts}
        prompts = in_flight.union(self._prompts.values(), self._handoffs.values())
        return tuple(tuple(self.cache.held(prompt.progress.tables)) for prompt in prompts)

    @property
    def blocks_in_flight(self) -> frozenset[int]:
        """The blocks of the primary cache group that launched steps may still write to."""
        prompts = [prompt for launch in self._launches for prompt in launch.prompts]
        return frozenset(block for prompt in prompts for block in self.cache.held(prompt.progress.tables))

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """Engine ids to which the connection is broken; see `KVConnector.broken_peers`."""
        return self._connector.broken_peers

    @property
    def load(self) -> Load:
        """The load now."""
        reserved: set[int] = set()
        quarantined: set[int] = set()
        for prompt in self._handoffs.values():
            if prompt.request.attempt_id not in self._prompts:
                quarantined.update(self.cache.held(prompt.progress.tables))
            elif prompt.computed:
                reserved.update(self.cache.held(prompt.progress.tables))
        return Load(
            total_blocks=self.cache.num_blocks,
            free_blocks=self.cache.num_free,
            reserved_blocks=len(reserved),
            quarantined_blocks=len(quarantined - reserved),
            running=self._scheduler.num_running + sum(self._awaited(p) for la in self._launches for p in la.finished),
            waiting=self._scheduler.num_waiting,
            waiting_tokens=self._scheduler.num_waiting_tokens,
            prefill_pace=self._pace.ratio,
        )

    def step(self) -> list[WorkerEvent]:
        """Do what is due: finished transfers, deadlines, the launch of a batch of chunks, first tokens."""
        for event in self._connector.poll():
            self._on_connector_event(event)
        self._enforce_deadlines()
        self._send_away()
        if chunks := self._scheduler.schedule():
            self._launches.append(self._launch(chunks))
        self._collect(self._steps_ahead if chunks and self._scheduler.can_schedule else 0)
        events, self._events = self._events, []
        return events

    def take_cache_update(self) -> CacheUpdate | None:
        """How the prefix cache has changed since the last call; None: not at all."""
        return self.cache.take_update()

    def _launch(self, chunks: list[Chunk]) -> Launch[Prompt]:
        """Queue a batch, and what follows from it for the handoffs and the schedule."""
        prompts = [self._prompts[chunk.prompt.attempt_id] for chunk in chunks]
        for prompt in prompts:
            prompt.started = prompt.started or self._clock()
        for chunk, prompt in zip(chunks, prompts, strict=True):
            if prompt.trace is not None:
                prompt.trace.begin_step(first_token=chunk.start, tokens=chunk.end - chunk.start)
        push_cached(self._connector, self.cache, chunks, prompts)
        parts = complete_blocks(chunks, prompts, self.cache, self.layers_per_write)
        self._pace.launched(self._predicted_s(chunks))
        on_layer = layer_pusher(self._connector, self._runner, parts)
        return launch_chunks(self._runner, self.cache, self._scheduler, chunks, prompts, on_layer)

    def _predicted_s(self, chunks: list[Chunk]) -> float:
        """How long a step takes, by what was measured of prompts one by one."""
        if len(chunks) == 1:
            return self.step_times.rest_seconds(chunks[0].end, chunks[0].start)
        return self.step_times.prefill_seconds(sum(chunk.end - chunk.start for chunk in chunks))

    def _collect(self, ahead: int) -> None:
        """Take the first tokens of the oldest launches, until only `ahead` are left in flight."""
        while len(self._launches) > ahead:
            launch = self._launches.popleft()
            finished = launch.wait(self.cache)
            self._pace.landed()
            for prompt in launch.prompts:
                if prompt.trace is not None:
                    prompt.trace.end_step("chunk")
                if prompt.cancelled:
                    self._give_back(prompt)
            for prompt, token in finished:
                if self._awaited(prompt):
                    self._accept(prompt, token)

    def _awaited(self, prompt: Prompt) -> bool:
        """Whether somebody still waits for the prompt's first token."""
        return self._prompts.get(prompt.request.attempt_id) is prompt and not prompt.computed

    def _accept(self, prompt: Prompt, sampled: list[SampledToken] | SamplingError) -> None:
        """A prompt has the first tokens of its samples, or none can be chosen for it."""
        request_id, attempt_id = prompt.request.request_id, prompt.request.attempt_id
        if isinstance(sampled, SamplingError):
            self._events.append(RequestFailed(request_id, sampled, attempt_id=attempt_id))
            if not isinstance(sampled, NoTokenLeftError):
                self.cache.forget(prompt.progress.tables, prompt.progress.hashes)  # it may be wrong itself
            del self._prompts[attempt_id]
            self._stop(prompt, str(sampled))
            return
        outputs = []
        for index, (state, token) in enumerate(zip(prompt.states, sampled, strict=True)):
            state.output_token_ids.append(token.token_id)
            outputs.append(TokenOutput(request_id, *token, finish_reason(state), index, attempt_id=attempt_id))
        self._finish(prompt, outputs)

    def _finish(self, prompt: Prompt, outputs: list[TokenOutput]) -> None:
        """The first tokens are known: tell the client and the decode worker."""
        now = self._clock()
        request = prompt.request
        prompt.computed = True
        if prompt.trace is not None:
            prompt.trace.mark("computed")
            if request.peer_engine is None:
                self._events.append(prompt_spans(prompt, prompt.trace))
        self._events += [
            PrefillReport(
                request.request_id,
                prompt.started - prompt.arrived,
                now - prompt.started,
                prompt.progress.num_chunks,
                prompt.progress.num_cached_tokens,
                attempt_id=request.attempt_id,
            ),
            *(() if prompt.scores is None else (prompt.scores.event(request),)),
            *outputs,
        ]
        if request.peer_engine is None:
            del self._prompts[request.attempt_id]
            self._give_back(prompt)
        else:
            first, *others = (output.token_id for output in outputs)
            self._connector.finish(request.handoff_id, first, tuple(others))
            prompt.deadline = min(prompt.deadline, now + self._handoff_timeout_s)

    def _on_connector_event(self, event: ConnectorEvent) -> None:
        if not isinstance(event, HandoffSent | HandoffAborted):
            raise TypeError(f"a prefill worker has no use for {event}")
        prompt = self._handoffs.pop(event.handoff_id)
        self._scheduler.remove(prompt.progress)
        self._give_back(prompt)
        request_id, attempt_id = prompt.request.request_id, prompt.request.attempt_id
        if self._prompts.pop(attempt_id, None) is None:
            return
        if prompt.trace is not None:
            self._events.append(prompt_spans(prompt, prompt.trace, event))
        if isinstance(event, HandoffSent):
            moved = (event.num_bytes, event.num_parts, event.transfer_s, event.exposed_s)
            self._events.append(HandoffReport(request_id, *moved, attempt_id=attempt_id))
        else:
            self._events.append(RequestFailed(request_id, HandoffError(event.reason), attempt_id=attempt_id))

    def _enforce_deadlines(self) -> None:
        now = self._clock()
        for attempt_id, prompt in [(a, p) for a, p in self._prompts.items() if p.deadline <= now]:
            del self._prompts[attempt_id]
            error = prompt.overdue(now, self._handoff_timeout_s)
            self._events.append(RequestFailed(prompt.request.request_id, error, attempt_id=attempt_id))
            self._stop(prompt, str(error))

    def _send_away(self) -> None:
        """Fail those for whom there will be no room here: they may go elsewhere, and hold nobody up."""
        unwanted = [p for p in self._handoffs.values() if p.request.attempt_id not in self._prompts]
        if not unwanted:
            return
        quarantined = self.cache.blocks_of(prompt.progress.tables for prompt in unwanted)
        waiting = self._scheduler.waiting
        for attempt_id in self._lost_room.find(
            quarantined, lambda: [self._scheduler.need(progress, progress.attempt_id) for progress in waiting]
        ):
            prompt = self._prompts.pop(attempt_id)
            error = no_room(quarantined[self.cache.primary], self.cache.num_blocks)
            self._events.append(RequestFailed(prompt.request.request_id, error, attempt_id=attempt_id))
            self._stop(prompt, str(error))

    def _stop(self, prompt: Prompt, reason: str) -> None:
        """Take a request that is no longer in `_prompts` out of the schedule; its blocks follow when they are safe."""
        if prompt.trace is not None:
            self._events.append(stopped_prompt_spans(prompt, prompt.trace, reason))
        self._scheduler.remove(prompt.progress)
        if prompt.request.peer_engine is None:
            self._give_back(prompt)
        else:
            self._connector.abort(prompt.request.handoff_id, reason)

    def _give_back(self, prompt: Prompt) -> None:
        """Free a prompt's blocks as soon as no step that writes to them is in flight."""
        prompt.cancelled = True
        if prompt.in_flight == 0:
            self.cache.release(prompt.progress.tables)
