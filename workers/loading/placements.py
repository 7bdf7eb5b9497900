"""From where a tensor belongs to where it is put, with its shape and dtype checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from workers.errors import CheckpointError
from workers.loading.pieces import BYTES, FLOATS, Placement, Quantized
from workers.loading.stored_tensor import StoredTensor
from workers.loading.weight_target import WeightTarget


def placement(
    name: str, target: WeightTarget, found: Mapping[str, StoredTensor], parameters: Mapping[str, torch.Tensor]
) -> Placement:
    """A tensor's way from its file into a parameter.

    Args:
        name: the tensor's in the checkpoint.
        target: its place.
        found: the checkpoint's tensors, this one and what scales it among them.
        parameters: the model's.

    Raises:
        CheckpointError: a tensor of another shape or dtype; names it and what is expected.
    """
    place, stored = target.place(parameters[target.parameter]), found[name]
    if target.quantized is None:
        _check_tensor(stored, target.shape, BYTES if target.raw else FLOATS)
        return Placement(stored, place, target.region, target.view)
    storage, scales = target.quantized.storage, None
    _check_tensor(stored, target.shape, storage.value_dtypes)
    if target.quantized.scales is not None:
        scales = found[target.quantized.scales]
        _check_tensor(scales, target.quantized.scales_shape, storage.scale_dtypes)
    return Placement(stored, place, target.region, target.view, Quantized(storage, scales))


def _check_tensor(stored: StoredTensor, shape: tuple[int, ...], dtypes: Iterable[str]) -> None:
    if stored.shape != shape:
        raise CheckpointError(f"{stored.file}: tensor {stored.name} has shape {stored.shape} where {shape} is expected")
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has dtype {stored.dtype}, it must be one of {', '.join(dtypes)}"
        )
