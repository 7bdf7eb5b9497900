"""How many workers the GPUs hold that a cluster has."""

from __future__ import annotations

import pytest

from cluster.pools.gpu_budget import GpuBudget, Share
from workers.errors import InvalidRequestError


def test_whole_gpus_are_counted() -> None:
    stock = GpuBudget(8.0, {"prefill": Share(1, 1.0), "decode.h100": Share(2, 1.0)})
    stock.check({"prefill": 2, "decode.h100": 3, "decode.cpu": 40})
    assert stock.most("decode.h100", {"prefill": 2, "decode.h100": 1}, 64) == 3
    assert stock.most("prefill", {"prefill": 2, "decode.h100": 1}, 64) == 6
    assert stock.most("prefill", {"prefill": 2, "decode.h100": 1}, 4) == 4, "never more than its places"
    assert stock.most("decode.cpu", {"prefill": 2, "decode.h100": 4}, 64) == 64, "it takes none"
    assert stock.most("prefill", {"prefill": 2, "decode.h100": 5}, 64) == 0


def test_a_refusal_has_the_figures_and_says_what_to_do() -> None:
    stock = GpuBudget(1.0, {"prefill": Share(1, 0.5), "decode": Share(1, 0.5)})
    with pytest.raises(
        InvalidRequestError,
        match=r"1 × 0\.5 for prefill and 2 × 0\.5 for decode, the Ray cluster has 1; .* begin with as many",
    ):
        stock.check({"prefill": 1, "decode": 2})
    stock.total = 2.0
    stock.check({"prefill": 1, "decode": 2})


@pytest.mark.parametrize(
    ("gpus", "share", "most"),
    [(2.0, 0.5, 4), (2.0, 0.4, 4), (1.0, 0.3333, 3), (1.0, 1.0, 1), (0.0, 0.5, 0), (5.0, 2.0, 2)],
)
def test_a_part_of_a_gpu_lies_on_one(gpus: float, share: float, most: int) -> None:
    assert GpuBudget(gpus, {"decode": Share(1, share)}).most("decode", {"decode": 0}, 64) == most


def test_unlike_parts_share_what_is_left() -> None:
    stock = GpuBudget(2.0, {"a": Share(1, 0.7), "b": Share(1, 0.3)})
    assert stock.most("b", {"a": 2, "b": 0}, 64) == 2
    assert stock.most("a", {"a": 0, "b": 4}, 64) == 1, "three of the others are on the other GPU"
