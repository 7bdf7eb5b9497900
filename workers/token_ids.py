"""Token ids as they travel from the door to the batch: one int32 array."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from workers.errors import InvalidRequestError

TokenIds: TypeAlias = npt.NDArray[np.int32]
"""(n,) int32. Never written to: gateway and workers of one process share it."""

NO_TOKENS: TokenIds = np.empty(0, dtype=np.int32)

_LIMIT = 2**31
"""Token ids are below this on every worker, whatever the vocabulary."""


def as_token_ids(ids: Sequence[int] | npt.NDArray[np.integer], what: str = "prompt token") -> TokenIds:
    """A one-dimensional array of these ids that is not to be written to; one of int32 is taken as it is.

    Errors call one of them `what`.

    Raises:
        InvalidRequestError: an id that is no int32, or ids with more than one dimension.
    """
    if isinstance(ids, np.ndarray):
        token_ids = _from_array(ids, what)
    else:
        try:
            token_ids = np.frombuffer(array("i", ids), dtype=np.int32)
        except OverflowError:
            wrong = next(token_id for token_id in ids if not -_LIMIT <= token_id < _LIMIT)
            raise InvalidRequestError(f"{what} {wrong} is out of range: ids are below {_LIMIT}") from None
    token_ids.flags.writeable = False
    return token_ids


def _from_array(ids: npt.NDArray[np.integer], what: str) -> TokenIds:
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidRequestError(f"{what}s are a {ids.dtype} array of shape {ids.shape}, expected integers (n,)")
    if ids.dtype == np.int32:
        return ids.view()  # type: ignore[return-value]
    if len(ids) and not (int(ids.min()) >= -_LIMIT and int(ids.max()) < _LIMIT):
        wrong = next(int(token_id) for token_id in ids if not -_LIMIT <= int(token_id) < _LIMIT)
        raise InvalidRequestError(f"{what} {wrong} is out of range: ids are below {_LIMIT}")
    return ids.astype(np.int32)
