"""Prompts that a decode worker computes itself, in chunks beside its decode steps: no prefill worker, no handoff.

Chunked prefill (Sarathi-Serve, arXiv:2403.02310): a step computes no more prompt tokens than a budget, so that the
sequences that decode have their token in every step, late by one chunk at most. Unlike there, chunk and decode step are
two passes of the model: the decode step stays the CUDA graph that it is, and a chunk that is worth the budget
is bound by computing, not by reading the weights a second time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workers.errors import SamplingError
from workers.kv_cache.manager import KVCacheManager
from workers.messages import PrefillReport, PromptLogprobs
from workers.runner.measured_tables import measured_tables, most_measured_tokens
from workers.runner.model_runner import ModelRunner, Row
from workers.sampling.prompt_logprobs import PromptScores
from workers.sampling.results import SampledToken
from workers.sampling.state import SamplingState
from workers.scheduling.lost_room import Need
from workers.scheduling.prefill_scheduler import PrefillScheduler, PromptProgress
from workers.scheduling.prefill_step import Launch, launch_chunks
from workers.scheduling.sequence import Sequence
from workers.token_ids import TokenIds


@dataclass(frozen=True)
class FirstToken:
    """A prompt is computed.

    Attributes:
        sequence: whose; its blocks hold the prompt, and are its owner's from now on.
        sampled: the first token of each of its samples, or why there are none.
        logprobs: of its prompt, if they are asked for.
        report: what the prompt took.
    """

    sequence: Sequence
    sampled: list[SampledToken] | SamplingError
    report: PrefillReport
    logprobs: PromptLogprobs | None = None


@dataclass(eq=False)
class _Prompt:
    """A prompt on its way.

    Attributes:
        sequence: whose.
        progress: how much of it is computed, steps in flight included.
        started: when its first chunk was launched; None before.
        in_flight: steps that compute some of it and have not been waited for.
        cancelled: whether its blocks go back as soon as no step is in flight.
        scores: its log-probabilities; None: they are not asked for.
    """

    sequence: Sequence
    progress: PromptProgress
    scores: PromptScores | None = None
    started: float | None = None
    in_flight: int = 0
    cancelled: bool = False

    @property
    def states(self) -> tuple[SamplingState, ...]:
        """For its first tokens, one of each sample."""
        return self.sequence.states

    @property
    def token_ids(self) -> TokenIds:
        """(n,) int32, the prompt."""
        return self.sequence.request.prompt_token_ids


class LocalPrefill:
    """The prompts that a decode worker computes, first come, first served.

    Who is admitted when is the worker's business, which has other requests for the same blocks.

    Args:
        runner: the model and its cache.
        cache: which blocks of it belong to whom.
        max_num_batched_tokens: prompt tokens that a step computes at most.
        max_num_seqs: prompts in a step.
        clock: the worker's.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCacheManager,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._clock = clock
        self._scheduler = PrefillScheduler(cache, max_num_batched_tokens, max_num_seqs)
        self._prompts: dict[str, _Prompt] = {}
        self._launches: deque[Launch[_Prompt]] = deque()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request.attempt_id in self._prompts

    @property
    def num_admitted(self) -> int:
        """Prompts that have blocks and no first token yet."""
        return len(self._prompts)

    @property
    def num_places(self) -> int:
        """Sequences that they will be in the batch."""
        return sum(prompt.sequence.num_samples for prompt in self._prompts.values())

    @property
    def block_tables(self) -> tuple[tuple[int, ...], ...]:
        """The blocks, of the primary group, of each prompt that holds some: also what only steps in flight write to."""
        prompts = {prompt for launch in self._launches for prompt in launch.prompts}.union(self._prompts.values())
        return tuple(tuple(self._cache.held(prompt.progress.tables)) for prompt in prompts)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of admitted prompts that are still to be computed."""
        return self._scheduler.num_waiting_tokens

    @property
    def has_work(self) -> bool:
        """Whether there is something to launch or to wait for."""
        return self.can_launch or self.in_flight

    @property
    def can_launch(self) -> bool:
        """Whether an admitted prompt has tokens to compute."""
        return self._scheduler.can_schedule

    @property
    def in_flight(self) -> bool:
        """Whether a step has been launched and not been waited for."""
        return bool(self._launches)

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for its prompt and its first tokens now."""
        return self._scheduler.fits(_progress_of(sequence), more_tokens=1)

    def need(self, sequence: Sequence) -> Need[Sequence]:
        """What `fits` asks for."""
        return self._scheduler.need(_progress_of(sequence), sequence, more_tokens=1)

    def admit(self, sequence: Sequence) -> None:
        """Take the blocks of a prompt that `fits`: it begins with those that are kept under its `hashes`.

        What is computed of it is kept under them, too.
        """
        progress = _progress_of(sequence)
        self._scheduler.admit(progress)
        sequence.tables = progress.tables
        self._prompts[progress.attempt_id] = _Prompt(sequence, progress, PromptScores.of(sequence.request))

    def remove(self, sequence: Sequence) -> None:
        """Nobody wants it any more; its blocks are free as soon as no step that writes to them is in flight."""
        prompt = self._prompts.pop(sequence.request.attempt_id)
        self._scheduler.remove(prompt.progress)
        prompt.cancelled = True
        self._give_back(prompt)

    def launch(self) -> bool:
        """Queue the next chunks; returns whether there are any."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return False
        prompts = [self._prompts[chunk.prompt.attempt_id] for chunk in chunks]
        for prompt in prompts:
            prompt.started = self._clock() if prompt.started is None else prompt.started
        self._launches.append(launch_chunks(self._runner, self._cache, self._scheduler, chunks, prompts))
        return True

    def collect(self, ahead: int) -> list[FirstToken]:
        """Wait for the oldest launches, until only `ahead` are left in flight: the prompts that they have ended."""
        ended = []
        while len(self._launches) > ahead:
            launch = self._launches.popleft()
            finished = launch.wait(self._cache)
            for prompt in launch.prompts:
                if prompt.cancelled:
                    self._give_back(prompt)
            for prompt, token in finished:
                if not prompt.cancelled:
                    ended.append(self._end(prompt, token))
        return ended

    def _end(self, prompt: _Prompt, sampled: list[SampledToken] | SamplingError) -> FirstToken:
        progress, now = prompt.progress, self._clock()
        del self._prompts[progress.attempt_id]
        started = now if prompt.started is None else prompt.started
        report = PrefillReport(
            prompt.sequence.request.request_id,
            started - prompt.sequence.arrived,
            now - started,
            progress.num_chunks,
            progress.num_cached_tokens,
            attempt_id=progress.attempt_id,
        )
        logprobs = None if prompt.scores is None else prompt.scores.event(prompt.sequence.request)
        return FirstToken(prompt.sequence, sampled, report, logprobs)

    def _give_back(self, prompt: _Prompt) -> None:
        if prompt.in_flight == 0:
            self._cache.release(prompt.progress.tables)


def warm_up_chunks(runner: ModelRunner, longest: int, max_model_len: int) -> None:
    """Compute chunks behind a prefix once, so that no decode step waits until their kernels are compiled.

    Overwrites cache blocks: call before there is anything in them.

    Args:
        runner: the model and its cache.
        longest: tokens of the longest chunk.
        max_model_len: tokens of the longest prompt.
    """
    prefix = runner.block_size
    num_blocks = runner.num_blocks
    capacity = most_measured_tokens(runner.groups, num_blocks)
    room = (max_model_len if capacity is None else min(max_model_len, capacity)) - prefix
    for length in sorted({min(length, room) for length in (2, longest)}):
        if length > 0:
            tables = measured_tables(runner.groups, num_blocks, prefix + length)
            runner.forward([Row([0] * length, prefix, tables)])


def _progress_of(sequence: Sequence) -> PromptProgress:
    """Of a prompt that has not been begun."""
    request = sequence.request
    return PromptProgress(
        request.attempt_id,
        len(request.prompt_token_ids),
        sequence.hashes,
        num_samples=sequence.num_samples,
        all_computed=request.sampling.prompt_logprobs is not None,
        owner=request.cache_owner,
    )
