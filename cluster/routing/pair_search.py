"""The cheapest of all pairs, without a look at all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_FEW, _MORE = 16, 4
_Floats = npt.NDArray[np.float64]
_Places = npt.NDArray[np.intp]


def cheapest_pair(
    rows: _Floats, columns: _Floats, extra: Callable[[_Places, _Places], _Floats], tolerance: float = 0.0
) -> tuple[int, int, float] | None:
    """The pair (i, j) of the lowest rows[i] + columns[j] + extra(i, j), and that; None: all are infinite.

    Looks at the cheapest few rows and columns first. Whoever is left out has a row or a column that is left out, and so
    costs no less than the cheapest of these with the cheapest partner: if that is no better than what was found, the
    search is over; if it is, more are looked at (the threshold algorithm of Fagin, Lotem and Naor, PODS 2001).

    Args:
        rows: cost of each row; infinite ones cannot be chosen.
        columns: cost of each column.
        extra: what the pairs of these rows and columns cost besides, (rows, columns); never negative.
        tolerance: the search may end with a pair that costs so much more than the cheapest, as a share.
    """
    if not len(rows) or not len(columns):
        return None
    few = _FEW
    while True:
        (ps, next_row), (ds, next_column) = _lowest(rows, few), _lowest(columns, few)
        costs = rows[ps][:, None] + columns[ds]
        costs += extra(ps, ds)
        at = int(costs.argmin())
        best = float(costs.flat[at])
        if best * (1.0 - tolerance) <= min(next_row + columns[ds].min(), next_column + rows[ps].min()):
            p, d = divmod(at, len(ds))
            return (int(ps[p]), int(ds[d]), best) if best < np.inf else None
        few *= _MORE


def _lowest(costs: _Floats, count: int) -> tuple[_Places, float]:
    """Where the lowest so many are, and the lowest of the others."""
    if count >= len(costs):
        return np.arange(len(costs)), np.inf
    order = costs.argpartition(count)
    return order[:count], float(costs[order[count]])
