"""Lengths, in tokens, as distributions that a command line can name."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

from workers.errors import ConfigError

FORMS = "fixed:N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA"


class Distribution(Protocol):
    """Something to draw whole numbers from, each at least 1."""

    @property
    def least(self) -> int:
        """The smallest that can come."""
        ...

    def sample(self, rng: random.Random) -> int:
        """Draw one."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always `value`."""

    value: int

    @property
    def least(self) -> int:
        """The value."""
        return self.value

    def sample(self, rng: random.Random) -> int:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Uniform:
    """`low` to `high`, both included, all equally likely."""

    low: int
    high: int

    @property
    def least(self) -> int:
        """`low`."""
        return self.low

    def sample(self, rng: random.Random) -> int:
        """Draw one."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class LogNormal:
    """Log-normal: many short, a few very long, as lengths of real prompts and answers are.

    Attributes:
        mean: of the numbers themselves (before rounding and the minimum of 1), not of their logarithms.
        sigma: standard deviation of the natural logarithm.
    """

    mean: float
    sigma: float

    @property
    def least(self) -> int:
        """1."""
        return 1

    def sample(self, rng: random.Random) -> int:
        """Draw one. The logarithm's mean is ln(mean) - sigma² / 2, so that the numbers' is `mean`."""
        return max(1, round(rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)))


def parse_distribution(text: str) -> Distribution:
    """The distribution that `text` names; a bare number is `fixed`.

    Raises:
        ConfigError: it names none, or its parameters are out of range.
    """
    kind, *parameters = text.strip().split(":")
    if not parameters:
        kind, parameters = "fixed", [kind]
    try:
        match kind, parameters:
            case "fixed", [value]:
                return _checked_fixed(text, int(value))
            case "uniform", [low, high]:
                return _checked_uniform(text, int(low), int(high))
            case "lognormal", [mean, sigma]:
                return _checked_lognormal(text, float(mean), float(sigma))
    except ValueError:
        raise ConfigError(f"distribution {text!r} has a parameter that is no number; it must be {FORMS}") from None
    raise ConfigError(f"{text!r} is no distribution; it must be {FORMS}")


def _checked_fixed(text: str, value: int) -> Fixed:
    if value < 1:
        raise ConfigError(f"distribution {text!r}: {value} tokens, at least 1 is needed")
    return Fixed(value)


def _checked_uniform(text: str, low: int, high: int) -> Uniform:
    if not 1 <= low <= high:
        raise ConfigError(f"distribution {text!r}: needs 1 <= LOW <= HIGH, not {low} and {high}")
    return Uniform(low, high)


def _checked_lognormal(text: str, mean: float, sigma: float) -> LogNormal:
    if not (1 <= mean < math.inf and 0 <= sigma < math.inf):
        raise ConfigError(f"distribution {text!r}: needs MEAN >= 1 and SIGMA >= 0, not {mean:g} and {sigma:g}")
    return LogNormal(mean, sigma)
