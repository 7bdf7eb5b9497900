"""Token ids as one array of int32, from whatever they come as."""

from __future__ import annotations

import numpy as np
import pytest

from workers.errors import InvalidRequestError
from workers.token_ids import as_token_ids


@pytest.mark.parametrize(
    "given", [[3, 1, 2], (3, 1, 2), range(3, 0, -1), np.array([3, 1, 2]), np.array([3, 1, 2], dtype=np.uint16)]
)
def test_whatever_they_come_as_they_are_int32_and_not_to_be_written_to(given):
    token_ids = as_token_ids(given)
    assert token_ids.dtype == np.int32
    assert token_ids.tolist() == list(given)
    with pytest.raises(ValueError, match="read-only"):
        token_ids[0] = 5


def test_an_int32_array_is_not_copied_and_stays_its_owners_to_write_to():
    given = np.arange(5, dtype=np.int32)
    assert np.shares_memory(as_token_ids(given), given)
    given[0] = 7


@pytest.mark.parametrize("wrap", [list, np.array])
@pytest.mark.parametrize("wrong", [2**31, 2**40, -(2**31) - 1])
def test_what_is_no_int32_is_refused_and_not_wrapped(wrap, wrong):
    with pytest.raises(InvalidRequestError, match=f"stop token {wrong} is out of range: ids are below 2147483648"):
        as_token_ids(wrap([1, wrong]), "stop token")


@pytest.mark.parametrize("given", [np.zeros((2, 2), dtype=np.int32), np.array([1.5])])
def test_other_arrays_are_refused(given):
    with pytest.raises(InvalidRequestError, match="expected integers"):
        as_token_ids(given)


def test_no_ids_are_an_empty_array():
    assert as_token_ids(()).shape == (0,)
