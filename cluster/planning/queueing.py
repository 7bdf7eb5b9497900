"""What waiting costs, from formulas: many servers behind one queue, and a batch that anybody may join."""

from __future__ import annotations

import math
from dataclasses import dataclass


def erlang_c(servers: int, load: float) -> float:
    """The share of arrivals that must wait, M/M/c (A. K. Erlang, 1917): those that find every server taken.

    Args:
        servers: c, at least 1.
        load: arrivals a second times the mean service time; 1 is returned from c on.
    """
    if load >= servers:
        return 1.0
    if load <= 0:
        return 0.0
    blocked = 1.0  # Erlang B by its recursion, which neither overflows nor cancels
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1.0 - load / servers * (1.0 - blocked))


def poisson_at_most(count: float, mean: float) -> float:
    """The share of a Poisson variable's values that are `count` or less."""
    if count < 0:
        return 0.0
    if mean <= 0:
        return 1.0
    if mean > 2000.0:  # where the normal curve is as good
        return 0.5 * math.erfc((mean - math.floor(count) - 0.5) / math.sqrt(2.0 * mean))
    terms = (math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(int(count) + 1))
    return min(1.0, math.fsum(terms))


@dataclass(frozen=True)
class Wait:
    """How long arrivals wait: a share of them at all, those exponentially.

    Attributes:
        share: that waits.
        rate: of the exponential, 1/s.
    """

    share: float
    rate: float

    @property
    def mean_s(self) -> float:
        """Of all arrivals."""
        return self.share / self.rate

    def within(self, seconds: float) -> float:
        """The share that waits no longer."""
        return 0.0 if seconds < 0 else 1.0 - self.share * math.exp(-self.rate * seconds)

    def quantile(self, share: float) -> float:
        """What `share` of the arrivals wait at most, seconds."""
        late = 1.0 - share
        return math.log(self.share / late) / self.rate if self.share > late else 0.0


def wait_of(servers: int, per_second: float, service_s: float, variation: float) -> Wait | None:
    """The wait of Poisson arrivals for one of equal servers, first come first served, M/G/c; None: it has no end.

    The share that waits is Erlang's; the mean is that of Allen and Cunneen, (1 + variation) / 2 times that of M/M/c,
    which is exact for one server (Pollaczek and Khinchine); the tail is exponential, as in heavy traffic (J. F. C.
    Kingman, "The single server queue in heavy traffic", 1961).

    Args:
        servers: at least 1.
        per_second: arrivals at all of them together.
        service_s: mean time of service.
        variation: its variance over its mean squared; 0 where all take as long.
    """
    load = per_second * service_s
    if load >= servers:
        return None
    return Wait(erlang_c(servers, load), 2.0 * (servers - load) / (service_s * (1.0 + variation)))
