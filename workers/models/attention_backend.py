"""The attention backend of a model that is being loaded, by what its worker will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attention.backend import AttentionBackend
from attention.backends.common.per_phase import backend_by_phase
from attention.errors import AttentionBackendError
from attention.platform import Platform
from attention.selection.measurements import load_ranking
from attention.selection.selector import log_selection, select_backend
from attention.spec import AttentionNeeds, Feature, Phase
from workers.errors import ConfigError


def choose_backend(
    kinds: Sequence[AttentionNeeds],
    device: torch.device,
    *,
    name: str | None = None,
    measurements: Path | None = None,
    local_prefill: bool = False,
) -> type[AttentionBackend]:
    """The backend for layers of these kinds; see `select_backend` for what decides.

    Args:
        kinds: every kind of layer that the model has, all with the same phase.
        device: where the model will run.
        name: the one that is configured, for all that the worker does.
        measurements: where `baton backends --measure` keeps its result.
        local_prefill: a decode worker computes prompts, too: each phase gets the backend that is best for it.

    Raises:
        ConfigError: none can run this model here, or the two of a worker that does both cannot share a cache.
    """
    platform, phase = Platform.of(device), kinds[0].phase
    try:
        if phase is Phase.DECODE and local_prefill:
            prefill, decode = (
                _choose([_with_phase(kind, each) for kind in kinds], platform, name, measurements)
                for each in (Phase.PREFILL, Phase.DECODE)
            )
            return backend_by_phase(prefill, decode, kinds)
        return _choose([_with_phase(kind, phase) for kind in kinds], platform, name, measurements)
    except AttentionBackendError as error:
        raise ConfigError(str(error)) from error


def _with_phase(kind: AttentionNeeds, phase: Phase | None) -> AttentionNeeds:
    """A prompt can be longer than a step: its later chunks attend to a prefix that is in the cache."""
    prefix = frozenset({Feature.PREFIX}) if phase is not Phase.DECODE else frozenset[Feature]()
    return replace(kind, phase=phase, features=kind.features | prefix)


def _choose(
    needs: Sequence[AttentionNeeds], platform: Platform, name: str | None, measurements: Path | None
) -> type[AttentionBackend]:
    fastest = load_ranking(measurements, platform, needs) if measurements is not None else ()
    selection = select_backend(platform, needs, name, fastest)
    log_selection(selection, str(needs[0].phase or "the model"))
    return selection.backend
