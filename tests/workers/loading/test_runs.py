"""Parts of tensors as runs of bytes, and cut into pieces."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from workers.loading.runs import Runs, as_one_run, cut, region_shape
from workers.loading.stored_tensor import Region, StoredTensor, whole

SHAPES = [(7,), (4, 5), (3, 4, 5), (2, 3, 2, 4)]


def regions(shape: tuple[int, ...]) -> list[Region]:
    """All of them, or one and none, for each dimension: its begin, middle or end, or all of it."""
    bounds = [{(0, n), (0, 1), (n - 1, n), (1, n), (n // 2, n // 2)} for n in shape]
    return list(itertools.product(*map(sorted, bounds)))


def numbers(shape: tuple[int, ...], region: Region) -> list[int]:
    tensor = torch.arange(math.prod(shape)).view(shape)
    return tensor[tuple(slice(*bounds) for bounds in region)].reshape(-1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_hold_the_elements_in_order(shape: tuple[int, ...]) -> None:
    stored = StoredTensor(Path("file"), "name", "F32", shape, 1000, math.prod(shape) * 4)
    for region in regions(shape):
        runs = Runs(stored, shape, region, 4)
        read = [(begin - 1000) // 4 + i for begin in runs.offsets() if runs.nbytes for i in range(runs.run_bytes // 4)]
        assert read == numbers(shape, region), region
        assert runs.nbytes == 4 * len(read)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_run_is_found_where_elements_follow_each_other(shape: tuple[int, ...]) -> None:
    for region in regions(shape):
        meant = numbers(shape, region)
        run = as_one_run(shape, region)
        if run is not None:
            assert list(range(*run[0])) == meant, region
        elif meant:
            assert meant != list(range(meant[0], meant[0] + len(meant))), region


@pytest.mark.parametrize("most", [1, 4, 10, 60, 10_000])
@pytest.mark.parametrize("num_dimensions", [0, 1, 2, 3])
def test_pieces_hold_everything_once_and_are_as_small_as_they_may_be(most: int, num_dimensions: int) -> None:
    region = ((1, 4), (0, 4), (2, 5))

    def size(part: Region) -> int:
        return math.prod(region_shape(part))

    pieces = list(cut(region, most, num_dimensions, size))
    assert sorted(n for piece in pieces for n in numbers((5, 4, 6), piece)) == numbers((5, 4, 6), region)
    smallest = math.prod(region_shape(region)[num_dimensions:])
    assert max(map(size, pieces)) <= max(most, smallest)


def test_what_fits_is_not_cut() -> None:
    assert list(cut(whole((3, 4)), 12, 2, lambda part: math.prod(region_shape(part)))) == [((0, 3), (0, 4))]
