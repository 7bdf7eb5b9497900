"""Which layers leave together: as forced, or by what the path costs and the prompt's compute hides."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attention.kv_cache import KVCacheSpec, layer_places
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.link_cost import LinkCost
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from workers.handoff.layers_per_write import LayersPerWrite
from workers.handoff.sending import CompleteBlocks, layer_pusher
from workers.runner.step_times import StepTimes

LAYERS = 32
SPEC = KVCacheSpec(tuple(range(LAYERS)), 8, 128, 64, torch.bfloat16)
MEASURED = StepTimes(prefill=((32, 3e-3), (512, 8e-3), (2048, 40e-3)))


class Measured(LocalConnector):
    """Knows what the way to one peer costs, which is all that it is asked for."""

    def link_to(self, engine_id: str) -> LinkCost | None:
        return LinkCost(write_s=40e-6, descriptor_s=5e-6, bytes_per_s=350e9) if engine_id == "d" else None


def chooser(fixed: int | None = None, step_times: StepTimes = MEASURED, after_attention: float = 0.0) -> LayersPerWrite:
    connector = Measured(LocalFabric())
    connector.register_kv_caches(
        "p",
        [torch.zeros(LAYERS, 1, 2, 1, 1, 1)],
        KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),)),
    )
    sizes = LayersPerWrite(connector, [SPEC], fixed, lambda num_tokens: after_attention)
    sizes.step_times = step_times
    return sizes


def test_a_number_forces_it():
    assert chooser(fixed=5).choose("d", 0, 1, 16) == 5


def test_short_prompts_leave_in_few_groups_and_long_ones_layer_by_layer():
    sizes = chooser()
    assert sizes.choose("d", 0, 1, 32) > 8
    assert sizes.choose("d", 0, 32, 2048) == 1


def test_what_is_computed_behind_the_last_cache_hides_one_write_of_everything():
    assert chooser(after_attention=0.8).choose("d", 0, 32, 2048) == LAYERS
    assert 1 < chooser(after_attention=0.1).choose("d", 0, 32, 2048) < LAYERS


def test_ranks_that_take_turns_by_layer_choose_among_their_own():
    """Four of them have 8 of 32 layers each, four times as long apart: as if the group had these alone."""

    def connector(layers: int, copies: int) -> LocalConnector:
        group = GroupLayout("mla", tuple(range(layers)), 1, 1, 1, "float32", copies=copies)
        made = Measured(LocalFabric())
        made.register_kv_caches("p", [torch.zeros(layers, 1, 1, 1)], KVLayout((group,), copies))
        return made

    of_four, alone = connector(LAYERS, 4), connector(LAYERS // 4, 1)
    for layer_bytes, layer_s, tail_s in ((1 << 16, 1e-4, 0.0), (1 << 22, 2e-5, 1e-4), (1 << 24, 1e-4, 2e-3)):
        own = alone.layers_per_write("d", 0, layer_bytes, 4 * layer_s, 0.0, tail_s)
        assert of_four.layers_per_write("d", 0, layer_bytes, layer_s, 0.0, tail_s) == 4 * own


def test_before_anything_is_known_every_layer_leaves_alone():
    assert chooser().choose("a stranger", 0, 1, 32) == 1


def test_without_a_capability_compute_hides_nothing():
    assert chooser(step_times=StepTimes()).choose("d", 0, 32, 2048) > 1


@pytest.mark.parametrize("num_layers", [1, 5, 6])
def test_every_layer_is_pushed_once_in_groups_of_each_parts_own_size(num_layers):
    pushed: dict[bytes, list[range]] = {b"a": [], b"b": []}

    def push(handoff_id, group, layers, start, blocks, ready):
        assert (group, start, blocks) == (0, 3, [7])
        pushed[handoff_id].append(layers)

    spec = replace(SPEC, layers=tuple(range(num_layers)))
    runner = SimpleNamespace(groups=[spec], places=layer_places([spec]), ready_event=lambda: None)
    parts = [CompleteBlocks(name, 0, 3, [7], size) for name, size in ((b"a", 2), (b"b", 4))]
    on_layer = layer_pusher(SimpleNamespace(push=push), runner, parts)
    for layer in range(num_layers):
        on_layer(layer)
        assert all(groups == [] or groups[-1].stop <= layer + 1 for groups in pushed.values())
    for name, size in ((b"a", 2), (b"b", 4)):
        expected = [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]
        assert pushed[name] == expected
