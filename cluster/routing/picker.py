"""The cheapest of all pairs, without a look at all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_FEW, _MORE = 8, 4
_Floats = npt.NDArray[np.float64]
_Places = npt.NDArray[np.intp]


def cheapest_pair(
    rows: _Floats,
    columns: _Floats,
    extra: Callable[[_Places, _Places], _Floats],
    least: _Floats,
    tolerance: float = 0.0,
) -> tuple[int, int, float] | None:
    """The pair (i, j) of the lowest rows[i] + columns[j] + its extra, and that; None: all are infinite.

    Looks at the cheapest few rows and columns first. Whoever is left out has a row or a column that is left out, and so
    costs no less than the cheapest of these with the cheapest partner: if that is no better than what was found, the
    search is over; if it is, more are looked at (the threshold algorithm of Fagin, Lotem and Naor, PODS 2001).

    Args:
        rows: cost of each row; infinite ones cannot be chosen.
        columns: cost of each column.
        extra: what pairs cost besides, given the row of each and the column of each.
        least: what a pair with each column costs besides, at least.
        tolerance: the search may end with a pair that costs so much more than the cheapest, as a share.
    """
    if not len(rows) or not len(columns):
        return None
    few, bounds = _FEW, columns + least
    while True:
        (ps, first_row, next_row), (ds, first_column, next_column) = _lowest(rows, few), _lowest(bounds, few)
        p, d = ps.repeat(len(ds)), ds[None].repeat(len(ps), 0).ravel()
        costs = extra(p, d)
        costs += columns[d]
        costs += rows[p]
        at = int(costs.argmin())
        best = float(costs[at])
        if best * (1.0 - tolerance) <= min(next_row + first_column, next_column + first_row):
            return (int(p[at]), int(d[at]), best) if best < np.inf else None
        few *= _MORE


def _lowest(costs: _Floats, count: int) -> tuple[_Places, float, float]:
    """Where the lowest so many are, the lowest of them, and the lowest of the others."""
    if count >= len(costs):
        return np.arange(len(costs)), float(costs.min()), np.inf
    order = costs.argpartition((0, count))
    return order[:count], float(costs[order[0]]), float(costs[order[count]])
