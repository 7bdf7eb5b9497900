"""The decode worker: reserves blocks, waits for the KV cache to arrive whole, decodes in a continuous batch.

Steps overlap: the next one is launched before the tokens of the one before are looked at, so that the device always
has work. A sequence that turns out to have ended has then run one step too many; that token is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from kv_transfer.connector import ConnectorEvent, HandoffFailed, HandoffReceived, HandoffReleased, KVConnector
from kv_transfer.messages import HandoffKey
from workers.block_manager import BlockManager, blocks_for
from workers.decode_batch import DecodeBatch, Sequence
from workers.decode_graphs import Progress
from workers.decode_runner import DecodeRunner, Launch
from workers.errors import BatonError, DeadlineExceededError, HandoffError, SamplingError
from workers.intake import check_capacity, check_prompt
from workers.messages import DecodeReport, DecodeRequest, Load, RequestFailed, TokenOutput, WorkerEvent
from workers.model_runner import ModelRunner
from workers.sampling.results import SampledToken
from workers.sampling.state import SamplingState, finish_reason


class DecodeWorker:
    """Decodes sequences whose prompts were computed elsewhere. A plain object: call `step` as long as `has_work`.

    A request waits for blocks, then for its KV cache, then runs. Memory grows on demand: when no block is left, the
    newest sequence makes room by moving its blocks to host memory, and comes back before anything new is admitted.

    Args:
        runner: the model and its cache.
        connector: with the cache registered.
        max_num_seqs: sequences in the batch.
        max_model_len: context window, tokens.
        steps_ahead: how many steps may be in flight while the next is launched; None: one on a GPU, and none on a
            CPU, where launching a step computes it.
        enforce_eager: use no CUDA graphs.
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
        steps_ahead: int | None = None,
        enforce_eager: bool = False,
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
        self._steps_ahead = int(runner.device.type == "cuda") if steps_ahead is None else steps_ahead
        self._launches: deque[Launch[Sequence]] = deque()
        self._connector = connector
        self._blocks = BlockManager(runner.kv_cache.shape[1])
        self._batch = DecodeBatch(self._blocks, runner, max_num_seqs)
        self._max_model_len = max_model_len
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._expected: dict[HandoffKey, Sequence] = {}
        self._events: list[WorkerEvent] = []

    def reserve(self, request: DecodeRequest) -> None:
        """Queue a request for blocks. One that is wrong or can never fit ends in `RequestFailed`."""
        num_tokens = len(request.prompt_token_ids)
        try:
            check_prompt(num_tokens, request.sampling, self._max_model_len)
            check_capacity(num_tokens + 1, self._runner.block_size, self._blocks.num_blocks, "decode")
        except BatonError as error:
            self._events.append(RequestFailed(request.request_id, error))
            return
        state = SamplingState.of(request, self._runner.model.config.eos_token_ids, self._max_model_len)
        sequence = Sequence(request, state, deadline=self._clock() + request.timeout_s)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Stop a request, wherever it is; nothing more is said of it."""
        if sequence := self._sequences.pop(request_id, None):
            self._stop(sequence)

    def disconnect(self, engine_id: str) -> None:
        """A prefill worker's process is gone."""
        self._connector.disconnect(engine_id)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        return (
            self._batch.size > 0
            or bool(self._launches)
            or self._batch.can_resume
            or bool(self._events)
            or self._can_admit()
        )

    @property
    def has_requests(self) -> bool:
        """Whether anything is under way, or blocks are held for someone who might still write to them."""
        return bool(self._sequences) or bool(self._expected) or bool(self._launches)

    @property
    def load(self) -> Load:
        """The load now."""
        wanted = [s for s in self._expected.values() if s.request.request_id in self._sequences]
        unwanted = [s for s in self._expected.values() if s.request.request_id not in self._sequences]
        return Load(
            total_blocks=self._blocks.num_blocks,
            free_blocks=self._blocks.num_free,
            reserved_blocks=sum(len(s.blocks) for s in wanted),
            quarantined_blocks=sum(len(s.blocks) for s in unwanted),
            running=self._batch.size,
            waiting=len(self._waiting) + len(wanted),
            waiting_tokens=sum(len(s.request.prompt_token_ids) for s in (*self._waiting, *wanted)),
            preempted=self._batch.num_preempted,
        )

    def step(self) -> list[WorkerEvent]:
        """Do what is due: arrivals, deadlines, reservations, the next step's launch, the tokens of an earlier one."""
        for event in self._connector.poll():
            self._on_connector_event(event)
        self._enforce_deadlines()
        self._batch.resume_preempted()
        while self._can_admit():
            self._admit(self._waiting.popleft())
        self._decode()
        events, self._events = self._events, []
        return events

    def _can_admit(self) -> bool:
        if not self._waiting or self._batch.num_preempted:
            return False
        needed = blocks_for(len(self._waiting[0].request.prompt_token_ids) + 1, self._runner.block_size)
        wanted = sum(s.request.request_id in self._sequences for s in self._expected.values())
        return self._batch.size + wanted < self._batch.max_num_seqs and needed <= self._blocks.num_free

    def _admit(self, sequence: Sequence) -> None:
        """Set blocks aside for the prompt and grant them to the prefill worker."""
        request = sequence.request
        needed = blocks_for(len(request.prompt_token_ids), self._runner.block_size)
        sequence.blocks = self._blocks.allocate(needed)
        sequence.key = self._connector.expect(request.handoff_id, request.prefill_engine, sequence.blocks)
        self._expected[sequence.key] = sequence

    def _decode(self) -> None:
        """Launch a step, then take the tokens of those that are more than so many steps behind."""
        if self._launches and (self._steps_ahead == 0 or self._batch.lacks_blocks):
            self._collect(0)
        if batch := self._batch.schedule():
            self._launches.append(self.decoder.launch(batch))
            self._batch.launched(batch)
        self._collect(self._steps_ahead if batch else 0)

    def _collect(self, ahead: int) -> None:
        """Take the tokens of the oldest launches, until only `ahead` are left in flight."""
        while len(self._launches) > ahead:
            launch = self._launches.popleft()
            sampled = launch.sampled.tokens([sequence.state for sequence in launch.sequences])
            now = self._clock()
            for sequence, token in zip(launch.sequences, sampled, strict=True):
                if self._batch.landed(sequence):
                    self._accept(sequence, token, now)

    def _accept(self, sequence: Sequence, sampled: SampledToken | SamplingError, now: float) -> None:
        """A sequence has one more token, or none can be chosen for it."""
        request_id, output_token_ids = sequence.request.request_id, sequence.state.output_token_ids
        if isinstance(sampled, SamplingError):
            self._events.append(RequestFailed(request_id, sampled))
            self.abort(request_id)
            return
        output_token_ids.append(sampled.token_id)
        if len(output_token_ids) == sequence.request.num_output_tokens + 2:
            self._events.append(DecodeReport(request_id, now - sequence.received))
        reason = finish_reason(sequence.state)
        self._events.append(TokenOutput(request_id, sampled.token_id, sampled.logprob, sampled.top_logprobs, reason))
        if reason is not None:
            self._batch.remove(sequence)
            del self._sequences[request_id]

    def _on_connector_event(self, event: ConnectorEvent) -> None:
        match event:
            case HandoffReceived(key, first_token):
                self._join(self._expected.pop(key), first_token)
            case HandoffFailed(key, reason):
                sequence = self._expected[key]
                if self._sequences.pop(sequence.request.request_id, None) is not None:
                    self._events.append(RequestFailed(sequence.request.request_id, HandoffError(reason)))
            case HandoffReleased(key):
                self._blocks.free(self._expected.pop(key).blocks)
            case _:
                raise TypeError(f"a decode worker has no use for {event}")

    def _join(self, sequence: Sequence, first_token: int) -> None:
        """The KV cache is whole: the sequence goes on where prefill left it."""
        request_id = sequence.request.request_id
        if request_id not in self._sequences:  # aborted while the last part was on its way
            self._blocks.free(sequence.blocks)
            return
        sequence.received = self._clock()
        sequence.state.output_token_ids.append(first_token)
        if finish_reason(sequence.state) is not None:  # the prefill worker has told the client
            self._blocks.free(sequence.blocks)
            del self._sequences[request_id]
        else:
            self._batch.add(sequence)

    def _enforce_deadlines(self) -> None:
        now = self._clock()
        for request_id, sequence in [(r, s) for r, s in self._sequences.items() if s.deadline <= now]:
            del self._sequences[request_id]
            waiting = sequence.key is None or sequence.key in self._expected
            where = "waiting for the KV cache" if waiting else "decoding"
            self._events.append(RequestFailed(request_id, DeadlineExceededError(f"the deadline passed while {where}")))
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """End a sequence that is no longer in `_sequences`; its blocks follow when they are safe."""
        if sequence.key is None:
            self._waiting.remove(sequence)
        elif sequence.key in self._expected:
            self._connector.cancel(sequence.key)
        else:
            self._batch.remove(sequence)
