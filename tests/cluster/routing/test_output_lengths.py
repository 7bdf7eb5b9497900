"""How much of a cache requests will need, by the answers that have ended."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from cluster.routing.output_lengths import HORIZONS, OutputLengths, likely_peak


def learnt(lengths: list[int], max_tokens: int) -> OutputLengths:
    made = OutputLengths()
    for length in lengths:
        made.observe(max_tokens, length)
    return made


def test_without_experience_a_request_goes_on_to_its_limit():
    outlook = OutputLengths().outlook(96)
    assert outlook.alive.tolist() == [1, 1, 1, 1, 0, 0, 0, 0], "it lives in the spans that begin before token 96"
    assert outlook.growth[:4].tolist() == [16, 32, 64, 96]
    assert likely_peak(outlook.held(1000)) == 1096
    lengths = OutputLengths()
    assert lengths.outlook(89, 20) is lengths.outlook(96, 16), "limits and lengths are rounded"


def test_without_experience_no_limit_is_believed_that_is_the_whole_window():
    assert likely_peak(OutputLengths().outlook(100_000).held(1000)) == 1000 + 1024
    assert likely_peak(OutputLengths().outlook(100_000, 1024).held(2024)) == 2024 + 1024, "and it may go on"


def test_what_has_ended_is_what_is_expected():
    outlook = learnt([40] * 256, 4096).outlook(4096)
    one_in = 1 / 257  # of one imagined answer that goes on to the limit
    assert outlook.alive == pytest.approx([1, 1, 1, *[one_in] * 5])
    assert outlook.growth[2] == pytest.approx(40 + 24 * one_in)


def test_who_outlives_all_others_is_expected_to_go_on():
    outlook = learnt([40] * 256, 4096).outlook(4096, 64)
    assert outlook.alive == pytest.approx([1.0] * len(HORIZONS))
    assert outlook.growth == pytest.approx(HORIZONS)


def test_requests_with_other_limits_are_others():
    lengths = learnt([40] * 256, 4096)
    assert lengths.outlook(512).alive[3:] == pytest.approx([1 / 257] * 3 + [0, 0]), "of its own class nothing is known"
    for _ in range(32):
        lengths.observe(512, 500)
    assert lengths.outlook(512).alive[3:].tolist() == [1, 1, 1, 0, 0]
    assert lengths.outlook(4096).alive[3:] == pytest.approx([1 / 257] * 5)


def test_the_future_of_many_is_what_becomes_of_them():
    """In every span, the sum over requests is no less than what they hold at any step of it, and not much more."""
    rng = random.Random(0)
    draws = [min(2000, max(1, round(rng.lognormvariate(5.0, 0.8)))) for _ in range(3000)]
    lengths = learnt(draws[:256], 2047)
    running = [(rng.randint(50, 3000), draw, rng.randint(0, draw - 1)) for draw in draws[256:]]
    held = sum(lengths.outlook(2047, so_far).held(prompt + so_far) for prompt, _, so_far in running)
    for (begin, end), mean in zip(pairwise((0, *HORIZONS)), held[0], strict=True):
        actual = max(
            sum(prompt + so_far + step for prompt, length, so_far in running if so_far + step <= length)
            for step in np.linspace(begin + 1, end, 8, dtype=int)
        )
        assert actual < 1.1 * mean + 0.01 * held[0][0]
    assert held[0][0] < 1.1 * sum(prompt + so_far for prompt, _, so_far in running)


def test_head_room_grows_as_the_root_of_the_number():
    outlook = learnt([10, 1000] * 128, 2047).outlook(2047)
    one, hundred = outlook.held(100), 100 * outlook.held(100)
    mean = likely_peak(np.stack((hundred[0], np.zeros(len(HORIZONS)))))
    assert mean < likely_peak(hundred) < mean + 12 * likely_peak(one)
    assert likely_peak(hundred) < 100 * likely_peak(one)
