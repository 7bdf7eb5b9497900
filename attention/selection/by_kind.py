"""A backend for each kind of layer of a model: one for layers with a window, say, beside another for those without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attention.platform import Platform
from attention.selection.selector import Selection, select_backend
from attention.spec import AttentionNeeds, AttentionSpec

Ranking = Callable[[Sequence[AttentionNeeds]], Sequence[str]]
"""Backends as measured for some kinds of layers, fastest first."""


def select_by_kind(
    platform: Platform,
    needs: Sequence[AttentionNeeds],
    configured: str | None = None,
    fastest: Ranking = lambda _: (),
) -> Mapping[AttentionSpec, Selection]:
    """Choose for each kind of layer on its own; see `select_backend`.

    What is forced or configured is for all kinds. Layers whose backends lay a cache out in different ways are of
    different cache groups, so that the choice for one kind is nothing to another.

    Args:
        platform: where the model runs.
        needs: of every kind of layer that the model has, all of one phase and block size.
        configured: a name from the configuration.
        fastest: see `Ranking`.

    Raises:
        AttentionBackendError: see `select_backend`.
    """
    return {kind.spec: select_backend(platform, kind, configured, fastest([kind])) for kind in needs}
