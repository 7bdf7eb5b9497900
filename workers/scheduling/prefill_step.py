"""A step that computes chunks of prompts, on a prefill worker or beside decode steps: from its launch to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from workers.errors import SamplingError
from workers.kv_cache.prefix_cache import PrefixCache
from workers.runner.model_runner import ModelRunner, Row
from workers.sampling.results import SampledToken
from workers.sampling.state import SamplingState
from workers.scheduling.first_tokens import FirstTokens
from workers.scheduling.prefill_scheduler import Chunk, PrefillScheduler
from workers.token_ids import TokenIds


class StepPrompt(Protocol):
    """A prompt as its steps see it.

    Attributes:
        in_flight: steps that compute some of it and have not been waited for.
    """

    in_flight: int

    @property
    def token_ids(self) -> TokenIds:
        """(n,) int32, the prompt."""
        ...

    @property
    def state(self) -> SamplingState:
        """For its first token."""
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
    """

    chunks: Sequence[Chunk]
    prompts: Sequence[P]
    finished: Sequence[P]
    first_tokens: FirstTokens

    def wait(self, cache: PrefixCache, block_size: int) -> list[tuple[P, SampledToken | SamplingError]]:
        """Wait for it, and keep the full blocks that it has completed; the finished prompts with their first tokens."""
        sampled = self.first_tokens.wait()
        store_complete(cache, self.chunks, block_size)
        for prompt in self.prompts:
            prompt.in_flight -= 1
        return list(zip(self.finished, sampled, strict=True))


def launch_chunks(
    runner: ModelRunner,
    scheduler: PrefillScheduler,
    chunks: Sequence[Chunk],
    prompts: Sequence[P],
    on_layer: Callable[[int], None] | None = None,
) -> Launch[P]:
    """Queue a step, and note in the schedule that it is.

    Args:
        runner: the model and its cache.
        scheduler: that made the chunks.
        chunks: of the step, not yet `advance`d.
        prompts: whose they are, one each.
        on_layer: see `ModelRunner.forward`.
    """
    pairs = list(zip(chunks, prompts, strict=True))
    rows = []
    for chunk, prompt in pairs:
        prompt.in_flight += 1
        tokens = prompt.token_ids[chunk.start : chunk.end]
        rows.append(Row(tokens, chunk.start, chunk.prompt.blocks, wants_logits=chunk.last))
    logits = runner.forward(rows, on_layer)
    for chunk in chunks:
        scheduler.advance(chunk)
    finished = [prompt for chunk, prompt in pairs if chunk.last]
    first_tokens = FirstTokens(logits, [prompt.state for prompt in finished], runner.ready_event())
    return Launch(chunks, prompts, finished, first_tokens)


def store_complete(cache: PrefixCache, chunks: Sequence[Chunk], block_size: int) -> None:
    """Keep the full blocks that a step has completed. The step must be done, and their prompts must still hold them."""
    for chunk in chunks:
        progress = chunk.prompt
        full = range(chunk.start // block_size, chunk.end // block_size) if progress.hashes else ()
        for place in full:
            cache.store(progress.blocks[place], progress.hashes[place])
