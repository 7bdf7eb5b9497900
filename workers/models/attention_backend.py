"""The attention backends of a model that is being loaded, by its kinds of layers and by what its worker will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attention.backend import AttentionBackend
from attention.backends.common.per_phase import backend_by_phase
from attention.errors import AttentionBackendError
from attention.platform import Platform
from attention.selection.by_kind import select_by_kind
from attention.selection.measurements import load_ranking
from attention.selection.selector import Selection, log_selection
from attention.spec import AttentionNeeds, AttentionSpec, Feature, Phase
from workers.errors import ConfigError

Backends = Mapping[AttentionSpec, type[AttentionBackend]]
"""How each kind of layer attends."""


def choose_backends(
    kinds: Sequence[AttentionNeeds],
    device: torch.device,
    *,
    name: str | None = None,
    measurements: Path | None = None,
    local_prefill: bool = False,
) -> Backends:
    """A backend for each of these kinds of layers; see `select_backend` for what decides.

    Args:
        kinds: every kind of layer that the model has, all with the same phase and block size.
        device: where the model will run.
        name: the one that is configured, for all that the worker does.
        measurements: where `baton backends --measure` keeps its result.
        local_prefill: a decode worker computes prompts, too: each phase gets the backend that is best for it.

    Raises:
        ConfigError: none can run a kind here, or those of a worker that does both phases cannot share a cache.
    """
    platform, phase = Platform.of(device), kinds[0].phase
    phases = tuple(Phase) if phase is Phase.DECODE and local_prefill else (phase,)
    try:
        chosen = [_choose([_with_phase(kind, each) for kind in kinds], platform, name, measurements) for each in phases]
        if len(chosen) == 1:
            return chosen[0]
        prefill, decode = chosen
        return {kind.spec: backend_by_phase(prefill[kind.spec], decode[kind.spec], [kind]) for kind in kinds}
    except AttentionBackendError as error:
        raise ConfigError(str(error)) from error


def _with_phase(kind: AttentionNeeds, phase: Phase | None) -> AttentionNeeds:
    """A prompt can be longer than a step: its later chunks attend to a prefix that is in the cache."""
    prefix = frozenset({Feature.PREFIX}) if phase is not Phase.DECODE else frozenset[Feature]()
    return replace(kind, phase=phase, features=kind.features | prefix)


def _choose(
    needs: Sequence[AttentionNeeds], platform: Platform, name: str | None, measurements: Path | None
) -> Backends:
    def fastest(kinds: Sequence[AttentionNeeds]) -> Sequence[str]:
        return load_ranking(measurements, platform, kinds) if measurements is not None else ()

    selections = select_by_kind(platform, needs, name, fastest)
    where = str(needs[0].phase or "the model")
    if len({selection.backend for selection in selections.values()}) == 1:
        log_selection(next(iter(selections.values())), where)
        return _backends(selections)
    for spec, selection in selections.items():
        window = spec.sliding_window
        log_selection(selection, f"{where}, layers {f'with a window of {window}' if window else 'without a window'}")
    return _backends(selections)


def _backends(selections: Mapping[AttentionSpec, Selection]) -> Backends:
    return {spec: selection.backend for spec, selection in selections.items()}
