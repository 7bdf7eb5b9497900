"""Random weights for a shape without a checkpoint (`load_format` dummy), the same model on any number of ranks."""

from __future__ import annotations

import hashlib
import math

import torch

from workers.loading.quantized_storage import Mxfp4Storage
from workers.loading.runs import region_shape
from workers.loading.stored_tensor import Region
from workers.loading.weight_target import QuantizedSource, WeightTarget
from workers.models.causal_lm import CausalLM
from workers.models.weight_map import WeightMap

_DEVIATION = 0.02
_LARGER_SCALE = 120
"""Of MXFP4; two in three are such, the others half of it: the deviation is that of other weights."""
CHUNK_ELEMENTS = 2**24
"""Drawn at once, about: what they take beside the weights is small."""


def fill_randomly(model: CausalLM, weights: WeightMap, seed: int) -> None:
    """Draw weights from a normal distribution of deviation 0.02; norms multiply by one, biases are zeros.

    What a checkpoint would hold in MXFP4 is drawn so, with numbers of about that size, whether it is kept so or not.

    A number depends on the seed, the tensor's name and the place in the whole tensor (and on the dtype and the kind of
    device), so that ranks hold shards of one model.
    """
    generator = torch.Generator(device=model.device)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, targets in weights.targets.items():
        for target in targets:
            place = target.place(parameters[target.parameter])
            if "norm" in name:
                norm = modules[target.parameter.rpartition(".")[0]]
                place.fill_(0.0 if getattr(norm, "plus_one", False) else 1.0)
            elif len(target.shape) == 1 or name.endswith("bias"):
                place.zero_()
            elif target.raw:
                _draw(place, target.viewed, target.region, f"{seed} {name}", generator)
            elif target.quantized is not None and isinstance(target.quantized.storage, Mxfp4Storage):
                _draw_mxfp4(place, target, target.quantized, seed, name, generator)
            else:
                _draw(place, target.viewed, target.region, f"{seed} {name}", generator)


def _draw(place: torch.Tensor, shape: tuple[int, ...], region: Region, source: str, generator: torch.Generator) -> None:
    """Fill `place` with a region of a random tensor, which is drawn some rows at a time, each time from a new seed."""
    num_rows, *row_shape = shape
    (first, last), within = region[0], tuple(slice(*bounds) for bounds in region[1:])
    step = max(1, CHUNK_ELEMENTS // math.prod(row_shape))
    for begin in range(first // step * step, last, step):
        chunk = place.new_empty(min(step, num_rows - begin), *row_shape)
        generator.manual_seed(_seed(f"{source} {begin}"))
        if chunk.dtype != torch.uint8:
            chunk.normal_(0.0, _DEVIATION, generator=generator)
        elif source.endswith("scales"):
            chunk.random_(0, 3, generator=generator).clamp_(max=1).add_(_LARGER_SCALE - 1)
        else:
            chunk.random_(generator=generator)
        top, bottom = max(begin, first), min(begin + step, last)
        place[top - first : bottom - first] = chunk[(slice(top - begin, bottom - begin), *within)]


def _draw_mxfp4(
    place: torch.Tensor,
    target: WeightTarget,
    quantized: QuantizedSource,
    seed: int,
    name: str,
    generator: torch.Generator,
) -> None:
    """What `_draw` makes of the blocks and the scales, as numbers; an expert at a time."""
    storage, (first, last) = quantized.storage, target.region[0]
    for expert in range(first, last):
        own = ((expert, expert + 1), *target.region[1:])
        regions = storage.values_region(own), storage.scales_region(own)
        values, scales = (torch.empty(region_shape(each), dtype=torch.uint8, device=place.device) for each in regions)
        _draw(values, storage.values_shape(target.viewed), regions[0], f"{seed} {name}", generator)
        _draw(scales, storage.scales_shape(target.viewed), regions[1], f"{seed} {quantized.scales}", generator)
        place[expert - first].copy_(storage.dequantize(values, scales, own, place.dtype)[0])


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
