"""Length distributions: what parses, what is refused, what is drawn."""

import random
import statistics

import pytest

from benchmarks.distributions import Fixed, LogNormal, Uniform, parse_distribution
from workers.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fixed:12", Fixed(12)),
        ("12", Fixed(12)),
        (" uniform:3:9 ", Uniform(3, 9)),
        ("uniform:3:3", Uniform(3, 3)),
        ("lognormal:200:0.8", LogNormal(200.0, 0.8)),
        ("lognormal:200:0", LogNormal(200.0, 0.0)),
    ],
)
def test_parses(text: str, expected: object) -> None:
    assert parse_distribution(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "fixed", "fixed:0", "fixed:-3", "fixed:1.5", "fixed:1:2", "uniform:5", "uniform:9:3", "uniform:0:3",
        "uniform:a:b", "lognormal:100", "lognormal:0.5:1", "lognormal:100:-1", "lognormal:nan:1", "lognormal:inf:1",
        "zipf:1:2",
    ],
)  # fmt: skip
def test_refuses_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_distribution(text)
    assert repr(text) in str(raised.value) or text.partition(":")[0] in str(raised.value)


def test_samples_are_what_the_name_says() -> None:
    rng = random.Random(1)
    assert {Fixed(7).sample(rng) for _ in range(10)} == {7}
    assert {Uniform(2, 5).sample(rng) for _ in range(200)} == {2, 3, 4, 5}
    lengths = [LogNormal(100, 0.5).sample(rng) for _ in range(20_000)]
    assert statistics.mean(lengths) == pytest.approx(100, rel=0.02)
    assert statistics.median(lengths) < 95  # skewed: the median is mean * exp(-sigma² / 2) = 88
    assert min(LogNormal(1, 3).sample(rng) for _ in range(1000)) == 1


@pytest.mark.parametrize("text", ["fixed:4", "uniform:4:9", "lognormal:4:1"])
def test_nothing_is_below_the_least(text: str) -> None:
    distribution, rng = parse_distribution(text), random.Random(0)
    assert min(distribution.sample(rng) for _ in range(500)) >= distribution.least
