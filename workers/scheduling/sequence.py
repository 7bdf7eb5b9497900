"""One request on a decode worker, or one of its samples."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
import torch

from workers.block_hashes import BlockHashes
from workers.kv_cache.tables import SequenceTables
from workers.messages import WorkerRequest
from workers.request_trace import RequestTrace
from workers.sampling.state import SamplingState
from workers.token_ids import TokenIds, as_token_ids


@dataclass(eq=False)
class Sequence:
    """One request on a decode worker: until its prompt is whole all of it, from then on one of its samples.

    Attributes:
        request: what was asked.
        state: its tokens, as the sampler sees them.
        others: the states of the request's other samples, until they go on from the end of the prompt.
        index: of the request's samples the one that it is.
        unwanted: samples that nobody wants any more before they have begun.
        tells_decode: whether its second token is the request's first decoded one.
        deadline: monotonic time.
        arrived: when its request came, monotonic time.
        tables: its block tables; none while preempted. They grow in place; after preemption they are others.
        content: the hashes of its full blocks; None: they are not kept.
        num_cached_blocks: for each cache group, how many of the blocks that it needs of its prompt, the first ones,
            were here when it was admitted.
        received: when its KV cache was complete, monotonic time.
        host_copy: its cache while preempted: of each cache group the blocks that it held.
        in_flight: tokens that are being computed: launched, and not looked at yet.
        trace: when what happened; None: nobody asks.
        max_output: output tokens after which it ends at the latest.
    """

    request: WorkerRequest
    state: SamplingState
    deadline: float
    arrived: float = 0.0
    tables: SequenceTables = field(default_factory=SequenceTables)
    content: BlockHashes | None = None
    num_cached_blocks: Many[int] = ()
    received: float = 0.0
    host_copy: Many[torch.Tensor] | None = None
    in_flight: int = 0
    trace: RequestTrace | None = None
    others: Many[SamplingState] = ()
    index: int = 0
    unwanted: set[int] = field(default_factory=set)
    tells_decode: bool = True
    max_output: int = field(init=False)

    def __post_init__(self) -> None:
        room = self.state.max_model_len - len(self.state.prompt_token_ids)
        wanted = self.state.params.max_tokens
        self.max_output = room if wanted is None else min(room, wanted)

    @property
    def states(self) -> tuple[SamplingState, ...]:
        """Of all samples, until they part."""
        return (self.state, *self.others)

    @property
    def num_samples(self) -> int:
        """Sequences that it is, or will be."""
        return 1 + len(self.others)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens; all but the last are in the cache."""
        return len(self.state.prompt_token_ids) + len(self.state.output_token_ids)

    @property
    def hashes(self) -> Many[bytes]:
        """Of its full blocks, as far as they are known."""
        return self.content if self.content is not None else ()

    def token_ids(self, start: int, end: int) -> TokenIds:
        """Its tokens from `start` to before `end`."""
        prompt, output = self.state.prompt_token_ids, self.state.output_token_ids
        cut = len(prompt)
        return np.concatenate((prompt[start:end], as_token_ids(output[max(0, start - cut) : max(0, end - cut)])))

    @property
    def num_scheduled(self) -> int:
        """The same, and those in flight."""
        return self.num_tokens + self.in_flight

    @property
    def last_token(self) -> int | None:
        """The last token; None while it is in flight."""
        return None if self.in_flight else self.state.output_token_ids[-1]

    @property
    def ends_in_flight(self) -> bool:
        """Whether the tokens in flight are known to be its last ones."""
        return self.in_flight > 0 and len(self.state.output_token_ids) + self.in_flight >= self.max_output
