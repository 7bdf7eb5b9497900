"""A step that computes chunks of prompts, on a prefill worker or beside decode steps: from its launch to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from workers.errors import SamplingError
from workers.kv_cache.manager import KVCacheManager
from workers.runner.model_runner import ModelRunner, Row
from workers.sampling.prompt_logprobs import PromptScores, ScoredRows
from workers.sampling.results import SampledToken
from workers.sampling.state import SamplingState
from workers.scheduling.first_tokens import FirstTokens
from workers.scheduling.prefill_scheduler import Chunk, PrefillScheduler
from workers.token_ids import TokenIds


class StepPrompt(Protocol):
    """A prompt as its steps see it.

    Attributes:
        in_flight: steps that compute some of it and have not been waited for.
        scores: where its log-probabilities go; None: they are not asked for.
    """

    in_flight: int
    scores: PromptScores | None

    @property
    def token_ids(self) -> TokenIds:
        """(n,) int32, the prompt."""
        ...

    @property
    def states(self) -> Sequence[SamplingState]:
        """For the first tokens: one of each of its samples."""
        ...


P = TypeVar("P", bound=StepPrompt)


@dataclass(frozen=True)
class Launch(Generic[P]):
    """A step that is queued, or running, or done.

    Attributes:
        chunks: what it computes.
        prompts: whose chunks they are.
        finished: those of them that are computed with it.
        first_tokens: of the finished ones.
        scored: the tokens whose log-probabilities are asked for.
    """

    chunks: Sequence[Chunk]
    prompts: Sequence[P]
    finished: Sequence[P]
    first_tokens: FirstTokens
    scored: ScoredRows

    def wait(self, cache: KVCacheManager) -> list[tuple[P, list[SampledToken] | SamplingError]]:
        """Wait for it, and keep the full blocks that it has completed; the finished prompts with their first tokens.

        What lies behind a window by now is given back. A prompt has a first token for each of its samples.
        """
        sampled = self.first_tokens.wait()
        self.scored.wait()
        for chunk in self.chunks:
            progress = chunk.prompt
            if progress.hashes:
                cache.store(progress.tables, progress.hashes, chunk.start, chunk.end)
            cache.land(progress.tables, chunk.end)
            if chunk.last:
                cache.settle(progress.tables)
        for prompt in self.prompts:
            prompt.in_flight -= 1
        return list(zip(self.finished, sampled, strict=True))


def launch_chunks(
    runner: ModelRunner,
    cache: KVCacheManager,
    scheduler: PrefillScheduler,
    chunks: Sequence[Chunk],
    prompts: Sequence[P],
    on_layer: Callable[[int], None] | None = None,
) -> Launch[P]:
    """Queue a step, and note in the schedule that it is.

    Args:
        runner: the model and its cache.
        cache: which blocks of it belong to whom.
        scheduler: that made the chunks.
        chunks: of the step, not yet `advance`d.
        prompts: whose they are, one each.
        on_layer: see `ModelRunner.forward`.
    """
    pairs = list(zip(chunks, prompts, strict=True))
    rows, num_tokens = [], 0
    scored = ScoredRows()
    for chunk, prompt in pairs:
        prompt.in_flight += 1
        tokens = prompt.token_ids[chunk.start : chunk.end]
        tables = cache.row_tables(chunk.prompt.tables, chunk.start)
        rows.append(Row(tokens, chunk.start, tables, wants_logits=chunk.last))
        if prompt.scores is not None:
            scored.add(prompt.scores, num_tokens, prompt.token_ids[chunk.start + 1 : chunk.end + 1])
        num_tokens += len(tokens)
    if scored:
        model = runner.model
        score = partial(scored.launch, compute_logits=model.compute_logits, vocab_size=model.config.vocab_size)
        logits = runner.forward(rows, on_layer, score)
    else:
        logits = runner.forward(rows, on_layer)
    for chunk in chunks:
        scheduler.advance(chunk)
    finished = [prompt for chunk, prompt in pairs if chunk.last]
    first_tokens = FirstTokens(logits, [prompt.states for prompt in finished], runner.ready_event())
    return Launch(chunks, prompts, finished, first_tokens, scored)
