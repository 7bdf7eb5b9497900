"""The cheapest pair is found without a look at all of them."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.routing.picker import cheapest_pair


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_cheapest_of_all(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 200, size=2))
    rows, columns = (rng.exponential(rng.choice([0.01, 1.0]), size=size) for size in shape)
    rows[rng.random(shape[0]) < 0.2] = np.inf
    extra = rng.exponential(rng.choice([0.01, 1.0, 100.0]), size=shape)
    extra[rng.random(shape) < rng.choice([0.1, 0.9])] = np.inf
    best = (rows[:, None] + columns + extra).min()
    least = extra.min(axis=0) * rng.random(shape[1])
    found = cheapest_pair(rows, columns, lambda ps, ds: extra[ps, ds], np.where(np.isinf(least), 0.0, least))
    if np.isinf(best):
        assert found is None
    else:
        assert found is not None
        p, d, cost = found
        assert cost == pytest.approx(best, rel=1e-12)
        assert cost == pytest.approx(rows[p] + columns[d] + extra[p, d], rel=1e-12)


def test_few_are_looked_at_where_the_others_cannot_be_cheaper():
    seen = []

    def extra(ps, ds):
        seen.append(len(ps))
        return np.zeros(len(ps))

    assert cheapest_pair(np.arange(1000.0), np.arange(1000.0)[::-1].copy(), extra, np.zeros(1000)) == (0, 999, 0.0)
    assert sum(seen) < 1000


def test_no_more_is_looked_at_for_little():
    """A thousand equal workers whose pairs differ by a thousandth."""
    rng, seen = np.random.default_rng(0), []

    def extra(ps, ds):
        seen.append(len(ps))
        return rng.uniform(0.0005, 0.001, len(ps))

    found = cheapest_pair(np.full(1000, 0.5), np.full(1000, 0.5), extra, np.zeros(1000), tolerance=0.01)
    assert found is not None
    assert found[2] <= 1.001
    assert sum(seen) < 1000


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0)])
def test_nobody_has_no_pair(sizes):
    rows, columns = (np.zeros(size) for size in sizes)
    assert cheapest_pair(rows, columns, lambda ps, ds: np.zeros(len(ps)), columns) is None
