"""Requests as services see them: long prompts of uneven lengths, short answers, bursts.

Lengths follow what was published of Moonshot's traffic (Qin et al., "Mooncake: A KVCache-centric Disaggregated
Architecture for LLM Serving", FAST 2025, arXiv:2407.00079): prompts of 7,590 and answers of 182 tokens on average, both
with a long tail. They are drawn from log-normal distributions with a seed; this is not that trace itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

MEAN_PROMPT, SIGMA_PROMPT = 7590.0, 1.1
MEAN_OUTPUT, SIGMA_OUTPUT = 182.0, 0.9
_LONGEST_PROMPT, _LONGEST_OUTPUT = 120_000, 2_000
_LIMITS = (256, 512, 1024, 2048, 4096)
_FAMILIES, _EVENNESS = 500, 0.7
"""Of conversations, documents and tools; some are asked for much more often than others (a Pareto distribution)."""


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        at_s: when it comes.
        prompt_tokens: length of its prompt.
        output_tokens: tokens that it generates.
        max_tokens: that its client allows; 0: exactly those.
        family: prompts of one begin alike; 0: it is like no other.
        shared_tokens: so many at its beginning are the family's.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int = 0
    family: int = 0
    shared_tokens: int = 0


def make_trace(
    requests: int,
    per_second: float,
    seed: int,
    *,
    prompt_scale: float = 1.0,
    output_scale: float = 1.0,
    shared: float = 0.0,
) -> list[Arrival]:
    """A trace of so many requests, Poisson arrivals; the scales stretch the mean lengths.

    Clients allow generous lengths: one of a few usual limits, at random, of those that the answer keeps. Of its prompt
    the part of `shared` on average, a half at most, is what others of its family begin with, too.
    """
    scales = {"prompt_scale": prompt_scale, "output_scale": output_scale}
    return list(arrivals(requests, per_second, seed, **scales, shared=shared))


def arrivals(
    requests: int,
    per_second: float,
    seed: int,
    *,
    prompt_scale: float = 1.0,
    output_scale: float = 1.0,
    shared: float = 0.0,
) -> Iterator[Arrival]:
    """The same, one after the other."""
    rng, limits, contents = random.Random(seed), random.Random(seed + 1), random.Random(seed + 2)
    at_s = 0.0
    for _ in range(requests):
        at_s += rng.expovariate(per_second)
        prompt = _lognormal(rng, MEAN_PROMPT * prompt_scale, SIGMA_PROMPT, _LONGEST_PROMPT)
        output = _lognormal(rng, MEAN_OUTPUT * output_scale, SIGMA_OUTPUT, _LONGEST_OUTPUT)
        output = max(2, output)
        limit = limits.choice([limit for limit in _LIMITS if limit >= output])
        family, alike = (_family(contents), round(prompt * contents.uniform(0, 2 * shared))) if shared else (0, 0)
        yield Arrival(at_s, prompt, output, limit, family, alike)


def _family(rng: random.Random) -> int:
    return 1 + int(rng.paretovariate(_EVENNESS) - 1.0) % _FAMILIES


def _lognormal(rng: random.Random, mean: float, sigma: float, longest: int) -> int:
    """Log-normal with this mean (of the values themselves), cut at both ends."""
    return min(longest, max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))
