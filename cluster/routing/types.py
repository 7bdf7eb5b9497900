"""What a request asks of the workers, and what the router answers: plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # clients read these types, and have no numpy
    import numpy as np
    import numpy.typing as npt

    from cluster.routing.output_lengths import OutputLengthForecast
    from cluster.routing.prefix_index import PromptPrefix

LOOK_AHEAD_TOKENS = 64
"""Decode steps that a placement is judged by: about as long as today's load is likely to last."""


@dataclass(frozen=True)
class RoutingRequest:
    """What a request needs.

    Attributes:
        prompt_tokens: length of its prompt.
        max_tokens: the most tokens to generate.
        outlook: how many it is likely to generate; None: its growth, and that of the others, is not looked at.
        max_queued_s: a worker that has more prompts to compute than this is given none now.
        prefix: its prompt, as prefix caches are asked for it; None: they are not.
        cached: of its prompt, tokens that are in each prefix cache, by the caches' numbers; None: they are not asked.
        disaggregation: where its prompt may be computed: always on a prefill worker, never, or auto, on either.
        arrivals_per_s: how many other requests come in a second, to all workers.
        num_samples: sequences that go on from its prompt on the decode worker, which share the prompt's full blocks.
        all_computed: all of its prompt is computed, whatever of it is cached where that is done.
        avoid: pairs on which it has failed: taken only where there is no other.
    """

    prompt_tokens: int
    max_tokens: int
    outlook: OutputLengthForecast | None = None
    max_queued_s: float = math.inf
    prefix: PromptPrefix | None = field(default=None, compare=False)
    disaggregation: str = "always"
    arrivals_per_s: float = 0.0
    cached: npt.NDArray[np.float64] | None = field(default=None, compare=False)
    num_samples: int = 1
    all_computed: bool = False
    avoid: frozenset[tuple[str, str]] = frozenset()

    @property
    def steps(self) -> int:
        """Decode steps that a placement is judged by."""
        return min(self.max_tokens, LOOK_AHEAD_TOKENS)

    @property
    def in_pairs(self) -> bool:
        """Whether a prefill worker may compute it."""
        return self.disaggregation != "never"

    @property
    def alone(self) -> bool:
        """Whether its decode worker may compute it."""
        return self.disaggregation != "always"


@dataclass(frozen=True)
class Incompatibility:
    """Why two workers cannot work together; `forever`: waiting does not help."""

    reason: str
    forever: bool


Incompatibilities = Mapping[tuple[str, str], Incompatibility]
"""By (prefill, decode)."""


@dataclass(frozen=True)
class Placement:
    """A chosen pair, or a decode worker alone.

    Attributes:
        prefill: engine id; None: the decode worker computes the prompt itself.
        decode: engine id.
        ttft_s: predicted seconds until the first token.
        itl_s: predicted seconds between tokens, as the decode worker's batch is now.
        cached_tokens: of the prompt, that the worker that computes it has in its cache.
    """

    prefill: str | None
    decode: str
    ttft_s: float
    itl_s: float
    cached_tokens: int = 0


@dataclass(frozen=True)
class NoPlacement:
    """Nobody can take the request now; `explain` says why. `hopeless`: none could, even if all were idle and ready."""

    hopeless: bool


@dataclass(frozen=True)
class CandidateReport:
    """A pair, or a decode worker alone, as the router saw it for one request.

    Attributes:
        prefill: engine id; None: the decode worker would compute the prompt itself.
        decode: engine id.
        ttft_s: predicted seconds until the first token.
        itl_s: predicted seconds between tokens.
        cost_s: predicted seconds to the first token and through the next ones, and what others are delayed: the lowest
            is chosen.
        refusal: why it cannot serve the request now; empty if it can.
        chosen: whether it is the one.
        cached_tokens: of the prompt, that the worker that would compute it has in its cache.
        handoff_s: predicted seconds of the handoff that prefill does not hide.
        others_s: predicted seconds that the sequences on the decode worker would be held up by the prompt, in all.
        decode_cached_tokens: of the prompt, that the decode worker has in its cache, and that need not be moved.
    """

    prefill: str | None
    decode: str
    ttft_s: float
    itl_s: float
    cost_s: float
    refusal: str
    chosen: bool
    cached_tokens: int = 0
    handoff_s: float = 0.0
    others_s: float = 0.0
    decode_cached_tokens: int = 0
