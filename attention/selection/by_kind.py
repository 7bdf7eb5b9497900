"""A backend for each kind of layer of a model: one for layers with a window, say, beside another for those without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attention.cache_layout import shared_layout
from attention.errors import AttentionBackendError
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

    The kinds share one KV cache. Where the best for each would lay it out in different ways, it is the best of those
    that can do all. What is forced or configured is for all kinds.

    Args:
        platform: where the model runs.
        needs: of every kind of layer that the model has, all of one phase and block size.
        configured: a name from the configuration.
        fastest: see `Ranking`.

    Raises:
        AttentionBackendError: see `select_backend`.
    """
    selections = {kind.spec: select_backend(platform, kind, configured, fastest([kind])) for kind in needs}
    try:
        shared_layout({spec: selection.backend for spec, selection in selections.items()}, needs[0].block_size)
    except AttentionBackendError:
        return dict.fromkeys(selections, select_backend(platform, needs, configured, fastest(needs)))
    return selections
