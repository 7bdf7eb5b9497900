"""Whether a model keeps its experts in the four bits that a checkpoint holds them in."""

from __future__ import annotations

import logging
from collections.abc import Container

import torch

from attention.spec import Phase
from workers.errors import ConfigError
from workers.layers.moe.mxfp4 import kernels_read_mxfp4
from workers.models.weight_map import WeightMap

logger = logging.getLogger(__name__)

EXPERT_WEIGHTS = ("auto", "mxfp4", "dequantized")


def keeping_mxfp4(
    asked: str,
    weights: WeightMap,
    names: Container[str] | None,
    dtype: torch.dtype,
    device: torch.device,
    phase: Phase | None,
) -> WeightMap | None:
    """The map for a model that keeps them; None: they become plain weights while they are loaded.

    The numbers are the same either way. `auto` keeps them where kernels read them and a step takes as long as reading
    them does: prefill, bound by multiplying, is faster with plain weights.

    Args:
        asked: auto, mxfp4 or dequantized.
        weights: for plain weights.
        names: of the checkpoint's tensors; None: there is none.
        dtype: of activations.
        device: where it will run.
        phase: the batches that will come; None: any.

    Raises:
        ConfigError: something else was asked for, or mxfp4 where the checkpoint has none.
    """
    if asked not in EXPERT_WEIGHTS:
        raise ConfigError(f"expert_weights {asked!r} is none of {', '.join(EXPERT_WEIGHTS)}")
    stored = [name for name in weights.in_mxfp4 if names is None or name in names]
    if not stored and asked == "mxfp4":
        raise ConfigError("expert_weights is 'mxfp4', and the checkpoint holds no experts in MXFP4")
    if not stored or asked == "dequantized":
        return None
    if asked == "auto" and (phase == Phase.PREFILL or not kernels_read_mxfp4(device, dtype)):
        return None
    try:
        return weights.keeping_mxfp4()
    except ConfigError as error:
        logger.warning("experts become plain weights, of four times the size: %s", error)
        return None
