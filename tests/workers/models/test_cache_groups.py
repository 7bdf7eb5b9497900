"""How many ranks keep the same of a cache group: all of a latent, some of heads where there are more ranks."""

from __future__ import annotations

import pytest
import torch

from attention.kv_cache import KVCacheSpec
from attention.spec import MLASpec
from workers.models.cache_groups import copies_of_groups
from workers.models.config.attention_config import AttentionConfig

LATENT = AttentionConfig(24, 1, 40, 1.0, None, mla=MLASpec(32, 8, 8, 16))


def heads(count: int) -> AttentionConfig:
    return AttentionConfig(24, count, 8, 1.0, None)


@pytest.mark.parametrize(
    ("size", "layers", "copies"),
    [
        (1, [LATENT, heads(1)], 1),
        (8, [LATENT, LATENT], 8),
        (2, [heads(4), heads(2)], 1),
        (4, [heads(2)], 2),
        (4, [heads(1)], 4),
        (4, [heads(1), heads(2)], 2),
        (6, [heads(2), heads(3)], 1),
    ],
)
def test_neighbours_keep_the_same_in_every_layer_of_the_group(size, layers, copies):
    places = tuple(range(len(layers)))
    groups = [KVCacheSpec(places, 1, 8, 16, torch.float32)]
    assert copies_of_groups(groups, layers, size) == (copies,)
    for rank in range(size):  # first head, as each rank of a share has it, of every layer
        same = range(rank - rank % copies, rank - rank % copies + copies)
        for layer in layers:
            assert len({other * layer.num_kv_heads // size for other in same}) == 1 or layer.num_kv_heads > size
