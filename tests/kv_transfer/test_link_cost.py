"""How many layers one WRITE carries, on plain numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.link_cost import LinkCost, layers_per_write, together

NVLINK = LinkCost(write_s=40e-6, descriptor_s=1e-6, bytes_per_s=300e9)
TOKEN_BYTES = 4096
"""Keys and values of one token in one layer: 8 heads of 128 in bf16."""


LAUNCH_S = 60e-6
"""What launching a layer's kernels takes: a prompt is not computed faster than that."""


def group(tokens: int, layer_s: float, path: LinkCost = NVLINK) -> int:
    return layers_per_write(path, 32, tokens * TOKEN_BYTES, layer_s, max(0.0, layer_s - LAUNCH_S))


def test_a_small_prompt_makes_few_posts_and_a_long_one_sends_each_layer():
    assert group(64, LAUNCH_S) >= 16
    assert group(15_000, 10e-3) == 1


def test_groups_are_as_large_as_the_tail_hides():
    layer_s, transfer_s = 10e-3, 15_000 * TOKEN_BYTES / NVLINK.bytes_per_s
    for hidden in (1, 5, 32):
        tail_s = NVLINK.write_s + (hidden + 0.5) * transfer_s
        size = layers_per_write(NVLINK, 32, 15_000 * TOKEN_BYTES, layer_s, layer_s, tail_s)
        assert size == hidden


def test_longer_prompts_make_smaller_groups():
    sizes = [group(tokens, max(LAUNCH_S, tokens * 0.7e-6)) for tokens in (32, 128, 512, 2048, 8192)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 1


def test_where_compute_hides_nothing_the_square_root_is_best():
    transfer_s = 512 * TOKEN_BYTES / NVLINK.bytes_per_s
    best = math.sqrt(32 * NVLINK.write_s / transfer_s)
    assert abs(group(512, 0.0) - best) <= 3


def test_cheap_posts_make_small_groups():
    cheap, dear = LinkCost(1e-6, 0.0, 300e9), LinkCost(50e-6, 0.0, 300e9)
    assert group(512, LAUNCH_S, cheap) < group(512, LAUNCH_S, dear)


@given(
    num_layers=st.integers(1, 128),
    layer_bytes=st.integers(0, 1 << 32),
    layer_s=st.floats(0, 10),
    slack_s=st.floats(0, 10),
    tail_s=st.floats(0, 10),
    write_s=st.floats(1e-9, 1),
    bytes_per_s=st.floats(1e3, 1e13),
)
def test_the_answer_is_a_number_of_layers(num_layers, layer_bytes, layer_s, slack_s, tail_s, write_s, bytes_per_s):
    path = LinkCost(write_s, 0.0, bytes_per_s)
    assert 1 <= layers_per_write(path, num_layers, layer_bytes, layer_s, slack_s, tail_s) <= num_layers


@pytest.mark.parametrize("num_layers", [1, 2, 7, 33])
def test_nothing_to_send_is_sent_at_once(num_layers):
    assert layers_per_write(NVLINK, num_layers, 0, 0.0) == num_layers


def test_lanes_that_are_used_at_once_are_as_fast_as_the_slowest_lets_them():
    lanes = [NVLINK, LinkCost(write_s=50e-6, descriptor_s=0.5e-6, bytes_per_s=100e9)]
    assert together(lanes) == LinkCost(write_s=50e-6, descriptor_s=1e-6, bytes_per_s=200e9)
    assert together(lanes[:1]) == NVLINK
    assert together([]) is None
