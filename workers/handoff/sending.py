"""A prompt on a prefill worker, and what of it a step hands over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kv_transfer.connector import KVConnector
from workers.errors import BatonError, DeadlineExceededError, HandoffError
from workers.grammars.matcher import TokenMatcher
from workers.handoff.layers_per_write import LayersPerWrite
from workers.kv_cache.manager import KVCacheManager
from workers.messages import WorkerRequest
from workers.request_trace import RequestTrace
from workers.runner.model_runner import ModelRunner
from workers.sampling.prompt_logprobs import PromptScores
from workers.sampling.state import SamplingState, sample_states
from workers.scheduling.prefill_scheduler import Chunk, PromptProgress
from workers.token_ids import TokenIds


@dataclass(eq=False)
class Prompt:
    """A request on a prefill worker.

    Attributes:
        request: as it came.
        progress: how much of it is computed, as the schedule knows it: steps in flight included.
        states: for its first tokens, one of each sample.
        deadline: when it fails, by the worker's clock.
        arrived: when it came.
        started: when its first chunk was launched.
        computed: whether its first token is known.
        in_flight: steps that compute some of it and have not been waited for.
        cancelled: whether its blocks go back as soon as no step is in flight.
        trace: when what happened; None: nobody asks.
        scores: its log-probabilities; None: they are not asked for.
    """

    request: WorkerRequest
    progress: PromptProgress
    states: Sequence[SamplingState]
    deadline: float
    arrived: float
    started: float = 0.0
    computed: bool = False
    in_flight: int = 0
    cancelled: bool = False
    trace: RequestTrace | None = None
    scores: PromptScores | None = None

    @classmethod
    def of(
        cls,
        request: WorkerRequest,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        now: float,
        cached_block_size: int | None = None,
        matchers: Sequence[TokenMatcher | None] = (),
    ) -> Prompt:
        """A request that has just come and is in order; its blocks have hashes if a block size is given."""
        hashes = request.hashes_for(cached_block_size) if cached_block_size is not None else ()
        scores = PromptScores.of(request)
        num_tokens = len(request.prompt_token_ids)
        return cls(
            request,
            PromptProgress(
                request.attempt_id, num_tokens, hashes, all_computed=scores is not None, owner=request.cache_owner
            ),
            sample_states(request, eos_token_ids, max_model_len, matchers),
            deadline=now + request.timeout_s,
            arrived=now,
            trace=RequestTrace.of(request),
            scores=scores,
        )

    @property
    def token_ids(self) -> TokenIds:
        """(n,) int32, the prompt."""
        return self.request.prompt_token_ids

    def overdue(self, now: float, handoff_timeout_s: float) -> BatonError:
        """Why it failed when its deadline passed: the request's own, or the handoff's."""
        if now < self.arrived + self.request.timeout_s:
            return HandoffError(f"the KV cache was not handed over within {handoff_timeout_s:g} s")
        where = "handing over the KV cache" if self.computed else "waiting for or computing its prompt"
        return DeadlineExceededError(f"the deadline passed while {where}")


@dataclass(frozen=True)
class CompleteBlocks:
    """Blocks of a prompt that a step completes.

    Attributes:
        handoff_id: whose.
        group: the cache group.
        start: the first one's place in the prompt.
        blocks: the blocks.
        layers_per_write: layers of them that one WRITE carries.
        trace: of the prompt; None: nobody asks.
    """

    handoff_id: bytes
    group: int
    start: int
    blocks: Sequence[int]
    layers_per_write: int
    trace: RequestTrace | None = None


def complete_blocks(
    chunks: Sequence[Chunk], prompts: Sequence[Prompt], cache: KVCacheManager, layers_per_write: LayersPerWrite
) -> list[CompleteBlocks]:
    """What the step of these chunks completes of the prompts that decode elsewhere.

    Args:
        chunks: of the step, not yet `advance`d.
        prompts: whose they are.
        cache: of the worker.
        layers_per_write: chooses how many layers go together.
    """
    num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
    parts = []
    for chunk, prompt in zip(chunks, prompts, strict=True):
        if (engine := prompt.request.peer_engine) is None:
            continue
        for group, span, blocks in _handed_over(cache, chunk.prompt, chunk.start, chunk.end):
            layers = layers_per_write.choose(engine, group, len(span), num_tokens)
            complete = (prompt.request.handoff_id, group, span.start, blocks, layers)
            parts.append(CompleteBlocks(*complete, prompt.trace))
    return parts


def push_cached(
    connector: KVConnector, cache: KVCacheManager, chunks: Sequence[Chunk], prompts: Sequence[Prompt]
) -> None:
    """Hand over what prompts that begin with these chunks have found in the cache: it is complete, in all layers.

    Args:
        connector: of the worker.
        cache: of the worker.
        chunks: of a step, not yet `advance`d.
        prompts: whose they are.
    """
    for chunk, prompt in zip(chunks, prompts, strict=True):
        if chunk.prompt.num_chunks or prompt.request.peer_engine is None:
            continue
        for group, span, blocks in _handed_over(cache, chunk.prompt, 0, chunk.start):
            layers = range(cache.groups[group].num_layers)
            connector.push(prompt.request.handoff_id, group, layers, span.start, blocks, None)
            if prompt.trace is not None:
                _note_push(prompt.trace, group, layers, blocks)


def layer_pusher(
    connector: KVConnector, runner: ModelRunner, parts: Sequence[CompleteBlocks]
) -> Callable[[int], None] | None:
    """What `ModelRunner.forward` calls for each layer, to push these blocks, some layers together; None: nothing.

    Args:
        connector: of the worker.
        runner: whose device says when a layer is computed.
        parts: what a step completes.
    """
    if not parts:
        return None
    of_group = [[part for part in parts if part.group == group] for group in range(len(runner.groups))]

    def on_layer(layer: int) -> None:
        group, index = runner.places[layer]
        last = index + 1 == runner.groups[group].num_layers
        due = [part for part in of_group[group] if last or (index + 1) % part.layers_per_write == 0]
        if not due:
            return
        ready = runner.ready_event()
        for part in due:
            layers = range(index // part.layers_per_write * part.layers_per_write, index + 1)
            connector.push(part.handoff_id, group, layers, part.start, part.blocks, ready)
            if part.trace is not None:
                _note_push(part.trace, group, layers, part.blocks)

    return on_layer


def _note_push(trace: RequestTrace, group: int, layers: range, blocks: Sequence[int]) -> None:
    trace.mark("pushed")
    trace.event("push", group=group, first_layer=layers.start, layers=len(layers), blocks=len(blocks))


def _handed_over(
    cache: KVCacheManager, prompt: PromptProgress, start: int, end: int
) -> Iterator[tuple[int, range, Sequence[int]]]:
    """For each cache group the places of the blocks that these tokens complete, as far as decode sees them; blocks."""
    for index, (group, table) in enumerate(zip(cache.groups, prompt.tables.groups, strict=True)):
        if span := group.handed_over(start, end, prompt.num_tokens):
            yield index, span, table.blocks[span.start : span.stop]
