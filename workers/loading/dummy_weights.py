"""Random weights for a shape without a checkpoint (`load_format` dummy), the same model on any number of ranks."""

from __future__ import annotations

import hashlib

import torch

from workers.loading.checkpoint import Region
from workers.loading.weight_map import weight_targets
from workers.models.causal_lm import Decoder

_DEVIATION = 0.02
CHUNK_ELEMENTS = 2**24
"""Drawn at once, about: what they take beside the weights is small."""


def fill_randomly(decoder: Decoder, seed: int) -> None:
    """Draw weights from a normal distribution of deviation 0.02; norms become ones, biases zeros.

    A number depends on the seed, the tensor's name and the place in the whole tensor (and on the dtype and the kind of
    device), so that ranks hold shards of one model.
    """
    generator = torch.Generator(device=decoder.device)
    parameters = dict(decoder.named_parameters())
    for name, target in weight_targets(decoder.config, decoder.group.rank, decoder.group.size).items():
        place = parameters[target.parameter][target.begin : target.end]
        if "norm" in name:
            place.fill_(1.0)
        elif name.endswith("bias"):
            place.zero_()
        else:
            _draw(place, target.shape, target.region, f"{seed} {name}", generator)


def _draw(place: torch.Tensor, shape: tuple[int, ...], region: Region, source: str, generator: torch.Generator) -> None:
    """Fill `place` with a region of a random matrix, which is drawn some rows at a time, each time from a new seed."""
    num_rows, num_columns = shape
    (first, last), columns = region[0], slice(*region[1])
    step = max(1, CHUNK_ELEMENTS // num_columns)
    for begin in range(first // step * step, last, step):
        chunk = place.new_empty(min(step, num_rows - begin), num_columns)
        chunk.normal_(0.0, _DEVIATION, generator=generator.manual_seed(_seed(f"{source} {begin}")))
        top, bottom = max(begin, first), min(begin + step, last)
        place[top - first : bottom - first] = chunk[top - begin : bottom - begin, columns]


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
