"""The prefill worker: computes prompts, samples the first token, pushes the KV cache while it computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.connector import ConnectorEvent, HandoffAborted, HandoffSent, KVConnector
from workers.block_manager import BlockManager
from workers.errors import BatonError, DeadlineExceededError, HandoffError, SamplingError
from workers.intake import check_capacity, check_prompt, check_token_ids
from workers.messages import (
    HandoffReport,
    Load,
    PrefillReport,
    PrefillRequest,
    RequestFailed,
    TokenOutput,
    WorkerEvent,
)
from workers.model_runner import ModelRunner, Row
from workers.prefill_scheduler import Chunk, PrefillScheduler, PromptProgress
from workers.sampling.isolation import sample_isolated
from workers.sampling.state import SamplingState, finish_reason


@dataclass(eq=False)
class _Prompt:
    request: PrefillRequest
    progress: PromptProgress
    state: SamplingState
    deadline: float
    arrived: float
    started: float = 0.0
    computed: bool = False


class PrefillWorker:
    """Computes prompts in chunks. A plain object: whoever owns it calls `step` as long as `has_work`.

    Args:
        runner: the model and its cache.
        connector: with the cache registered.
        max_num_batched_tokens: token budget of a step.
        max_num_seqs: prompts in a step.
        max_model_len: context window, tokens.
        layers_per_group: layers that one WRITE carries.
        handoff_timeout_s: how long after the first token the cache may take to arrive.
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
        layers_per_group: int = 1,
        handoff_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._connector = connector
        self._blocks = BlockManager(runner.kv_cache.shape[1])
        self._scheduler = PrefillScheduler(self._blocks, runner.block_size, max_num_batched_tokens, max_num_seqs)
        self._max_model_len = max_model_len
        self._layers_per_group = layers_per_group
        self._handoff_timeout_s = handoff_timeout_s
        self._prompts: dict[str, _Prompt] = {}
        self._handoffs: dict[bytes, _Prompt] = {}
        self._events: list[WorkerEvent] = []

    def add(self, request: PrefillRequest) -> None:
        """Queue a prompt. One that is wrong or can never fit ends in `RequestFailed`."""
        num_tokens = len(request.prompt_token_ids)
        try:
            check_prompt(num_tokens, request.sampling, self._max_model_len)
            check_token_ids(request.prompt_token_ids, self._runner.model.config.vocab_size)
            check_capacity(num_tokens, self._runner.block_size, self._blocks.num_blocks, "prefill")
        except BatonError as error:
            self._events.append(RequestFailed(request.request_id, error))
            return
        now = self._clock()
        prompt = _Prompt(
            request,
            PromptProgress(request.request_id, num_tokens),
            SamplingState(
                request.sampling,
                request.prompt_token_ids,
                frozenset(self._runner.model.config.eos_token_ids),
                self._max_model_len,
            ),
            deadline=now + request.timeout_s,
            arrived=now,
        )
        self._prompts[request.request_id] = prompt
        self._scheduler.add(prompt.progress)
        if request.decode_engine is not None:
            self._handoffs[request.handoff_id] = prompt
            self._connector.begin(request.handoff_id, request.decode_engine)

    def abort(self, request_id: str) -> None:
        """Stop a request, wherever it is; nothing more is said of it."""
        if prompt := self._prompts.pop(request_id, None):
            self._stop(prompt, "the request was cancelled")

    def disconnect(self, engine_id: str) -> None:
        """A decode worker's process is gone."""
        self._connector.disconnect(engine_id)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        return self._scheduler.can_schedule or bool(self._events)

    @property
    def has_requests(self) -> bool:
        """Whether anything is under way, on this worker or in flight from it."""
        return bool(self._prompts) or bool(self._handoffs)

    @property
    def load(self) -> Load:
        """The load now."""
        reserved = quarantined = 0
        for prompt in self._handoffs.values():
            if prompt.request.request_id not in self._prompts:
                quarantined += len(prompt.progress.blocks)
            elif prompt.computed:
                reserved += len(prompt.progress.blocks)
        return Load(
            total_blocks=self._blocks.num_blocks,
            free_blocks=self._blocks.num_free,
            reserved_blocks=reserved,
            quarantined_blocks=quarantined,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            waiting_tokens=self._scheduler.num_waiting_tokens,
        )

    def step(self) -> list[WorkerEvent]:
        """Do what is due: finished transfers, deadlines, then one batch of chunks."""
        for event in self._connector.poll():
            self._on_connector_event(event)
        self._enforce_deadlines()
        chunks = self._scheduler.schedule()
        if chunks:
            self._compute(chunks)
        events, self._events = self._events, []
        return events

    def _compute(self, chunks: list[Chunk]) -> None:
        rows = []
        for chunk in chunks:
            prompt = self._prompts[chunk.prompt.request_id]
            prompt.started = prompt.started or self._clock()
            tokens = prompt.request.prompt_token_ids[chunk.start : chunk.end]
            rows.append(Row(tokens, chunk.start, chunk.prompt.blocks, wants_logits=chunk.last))
        parts = [
            (self._prompts[chunk.prompt.request_id].request.handoff_id, self._scheduler.pushable(chunk), chunk.prompt)
            for chunk in chunks
            if self._prompts[chunk.prompt.request_id].request.decode_engine is not None
        ]
        parts = [part for part in parts if len(part[1]) > 0]

        def on_layer(layer: int) -> None:
            first = layer // self._layers_per_group * self._layers_per_group
            if layer + 1 - first < self._layers_per_group and layer + 1 < self._runner.num_layers:
                return
            ready = self._runner.ready_event() if parts else None
            for handoff_id, span, progress in parts:
                source = progress.blocks[span.start : span.stop]
                self._connector.push(handoff_id, range(first, layer + 1), span.start, source, ready)

        logits = self._runner.forward(rows, on_layer)
        finished = [self._prompts[chunk.prompt.request_id] for chunk in chunks if chunk.last]
        for chunk in chunks:
            self._scheduler.advance(chunk)
        if finished:
            for prompt, sampled in zip(finished, sample_isolated(logits, [p.state for p in finished]), strict=True):
                if isinstance(sampled, SamplingError):
                    self._events.append(RequestFailed(prompt.request.request_id, sampled))
                    del self._prompts[prompt.request.request_id]
                    self._stop(prompt, str(sampled))
                    continue
                prompt.state.output_token_ids.append(sampled.token_id)
                self._finish(
                    prompt,
                    TokenOutput(
                        prompt.request.request_id,
                        sampled.token_id,
                        sampled.logprob,
                        sampled.top_logprobs,
                        finish_reason(prompt.state),
                    ),
                )

    def _finish(self, prompt: _Prompt, output: TokenOutput) -> None:
        """The first token is known: tell the client and the decode worker."""
        now = self._clock()
        request = prompt.request
        prompt.computed = True
        self._events += [
            PrefillReport(
                request.request_id,
                prompt.started - prompt.arrived,
                now - prompt.started,
                prompt.progress.num_chunks,
            ),
            output,
        ]
        if request.decode_engine is None:
            del self._prompts[request.request_id]
            self._blocks.free(prompt.progress.blocks)
        else:
            self._connector.finish(request.handoff_id, output.token_id)
            prompt.deadline = min(prompt.deadline, now + self._handoff_timeout_s)

    def _on_connector_event(self, event: ConnectorEvent) -> None:
        if not isinstance(event, HandoffSent | HandoffAborted):
            raise TypeError(f"a prefill worker has no use for {event}")
        prompt = self._handoffs.pop(event.handoff_id)
        self._scheduler.remove(prompt.progress)
        self._blocks.free(prompt.progress.blocks)
        known = self._prompts.pop(prompt.request.request_id, None) is not None
        if not known:
            return
        request_id = prompt.request.request_id
        if isinstance(event, HandoffSent):
            self._events.append(
                HandoffReport(request_id, event.num_bytes, event.num_parts, event.transfer_s, event.exposed_s)
            )
        else:
            self._events.append(RequestFailed(request_id, HandoffError(event.reason)))

    def _enforce_deadlines(self) -> None:
        now = self._clock()
        for request_id, prompt in [(r, p) for r, p in self._prompts.items() if p.deadline <= now]:
            del self._prompts[request_id]
            where = "handing over the KV cache" if prompt.computed else "waiting for or computing its prompt"
            error: BatonError = DeadlineExceededError(f"the deadline passed while {where}")
            if now < prompt.arrived + prompt.request.timeout_s:
                error = HandoffError(f"the KV cache was not handed over within {self._handoff_timeout_s:g} s")
            self._events.append(RequestFailed(request_id, error))
            self._stop(prompt, str(error))

    def _stop(self, prompt: _Prompt, reason: str) -> None:
        """Take a request that is no longer in `_prompts` out of the schedule; its blocks follow when they are safe."""
        self._scheduler.remove(prompt.progress)
        if prompt.request.decode_engine is None:
            self._blocks.free(prompt.progress.blocks)
        else:
            self._connector.abort(prompt.request.handoff_id, reason)
