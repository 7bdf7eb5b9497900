"""What a planner is asked: lengths, objectives, what workers can do, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.errors import InvalidRequestError


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, each as likely as the others: one for all, or such as the middles of a trace's quartiles.

    Raises:
        InvalidRequestError: there is none, or one below 1.
    """

    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.values or min(self.values) < 1:
            raise InvalidRequestError(f"lengths are {self.values}, there must be some, each at least 1")

    @property
    def mean(self) -> float:
        """Tokens."""
        return sum(self.values) / len(self.values)

    @property
    def mean_square(self) -> float:
        """Tokens squared."""
        return sum(value * value for value in self.values) / len(self.values)


@dataclass(frozen=True)
class Workload:
    """What is asked: lengths of prompts and of answers, independent of each other."""

    prompt: Lengths
    output: Lengths

    @property
    def steps(self) -> float:
        """Decode steps of a request: every token but the first."""
        return self.output.mean - 1.0

    @property
    def context(self) -> float:
        """Tokens of a decoding sequence at a moment: longer answers are seen more often, each half done on average."""
        return self.prompt.mean + self.output.mean_square / (2.0 * self.output.mean)


@dataclass(frozen=True)
class Objective:
    """What a request should meet, and how many of them: seconds, and a share of all requests."""

    ttft_s: float
    itl_s: float
    share: float = 0.9

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.itl_s > 0 and 0 < self.share < 1):
            raise InvalidRequestError(f"{self}: times must be more than 0, the share between 0 and 1")


@dataclass(frozen=True)
class PrefillWorker:
    """What a prefill worker can do.

    Attributes:
        seconds: for a prompt of so many tokens.
        max_num_batched_tokens: that it computes in a step; 0: every prompt by itself.
        max_num_seqs: prompts in a step; 0: as many as have room.
    """

    seconds: Callable[[int], float]
    max_num_batched_tokens: int = 0
    max_num_seqs: int = 0


@dataclass(frozen=True)
class DecodeWorker:
    """What a decode worker can do.

    Attributes:
        step_seconds: for a step of so many sequences with so many tokens in their caches together.
        max_num_seqs: sequences in a batch.
        kv_tokens: that its cache holds.
    """

    step_seconds: Callable[[float, float], float]
    max_num_seqs: int
    kv_tokens: int


@dataclass(frozen=True)
class Fleet:
    """What there is to split up.

    Attributes:
        prefill: what one prefill worker can do.
        decode: what one decode worker can do.
        overhead_s: added to every first token: the way to the worker and back.
    """

    prefill: PrefillWorker
    decode: DecodeWorker
    overhead_s: float = 0.0


@dataclass(frozen=True)
class Split:
    """Workers of each pool; without prefill workers, those of the decode pool compute prompts too."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D" if self.prefill else f"{self.decode} mixed"
