"""Products with weights in oneDNN's own order: of any number of rows, by kernels of few."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.context import LayerContext
from workers.layers.linear import RowParallelLinear
from workers.layers.linear_methods.onednn import OneDnnLinear, kernel_rows
from workers.layers.residual import ResidualStream
from workers.parallel.group import SINGLE

MOST = 4096


def test_every_number_of_rows_has_one_of_few_kernels_hardly_larger() -> None:
    rows = [kernel_rows(n) for n in range(1, MOST + 1)]
    assert rows[:16] == list(range(1, 17))
    assert all(n <= found <= 1.125 * n for n, found in enumerate(rows, 1))
    assert rows == sorted(rows)
    assert all(kernel_rows(found) == found for found in rows)
    assert len(set(rows)) == 16 + 8 * 8


@pytest.mark.parametrize("num_rows", [1, 16, 17, 31, 100, 129])
def test_rows_that_fill_a_kernel_up_change_nothing(num_rows: int) -> None:
    method = OneDnnLinear()
    linear = nn.Module()
    linear.packed = None
    method.create_weights(linear, 24, 40, torch.float32, torch.device("cpu"))
    weight = torch.randn(40, 24)
    linear.weight.copy_(weight)
    method.process_weights(linear)
    assert linear.weight is None
    x, bias, residual, out = (
        torch.randn(num_rows, 24),
        torch.randn(40),
        torch.randn(num_rows, 40),
        torch.empty(num_rows, 40),
    )
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(method.apply(linear, x, bias), expected)
    assert method.apply(linear, x, bias, out=out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(method.apply(linear, x, bias, residual=residual.clone()), expected + residual)


def test_prompts_of_new_lengths_take_little_memory() -> None:
    """In a process of its own, in which nothing was multiplied before: pages that are kept, after 600 lengths."""
    code = """
import torch
from workers.layers.linear_methods.onednn import OneDnnLinear
def pages(): return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.set_num_threads(1)
method, linear = OneDnnLinear(), torch.nn.Module()
linear.packed = None
method.create_weights(linear, 256, 256, torch.float32, torch.device("cpu"))
linear.weight.zero_()
method.process_weights(linear)
with torch.inference_mode():
    method.apply(linear, torch.zeros(400, 256), None)
    before = pages()
    for num_rows in range(1, 401):
        method.apply(linear, torch.zeros(num_rows, 256), None)
print(pages() - before)
"""
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True, timeout=120, env=environment
    )
    assert int(found.stdout) < 80e6


def test_a_packed_weight_adds_to_the_residual_stream() -> None:
    """Where a product could be left in parts on a GPU there is none of it here."""
    context = LayerContext(torch.float32, torch.device("cpu"), SINGLE, OneDnnLinear())
    projection = RowParallelLinear(24, 40, True, context)
    for parameter in projection.parameters():
        parameter.normal_()
    weight = projection.weight
    assert weight is not None
    expected = weight.clone()
    projection.process_weights()
    assert projection.packed is not None
    x, value = torch.randn(3, 24), torch.randn(3, 40)
    stream = ResidualStream(value.clone())
    stream.add_product(projection, x)
    torch.testing.assert_close(stream.value, value + F.linear(x, expected, projection.bias), rtol=1e-5, atol=1e-5)
