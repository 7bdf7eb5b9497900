"""The choice of an attention backend, with the reasons against the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from attention.backend import AttentionBackend
from attention.errors import AttentionBackendError
from attention.platform import Platform
from attention.selection.forced import Forced
from attention.selection.priority import candidates
from attention.selection.registry import get_backend
from attention.spec import AttentionNeeds, Phase

logger = logging.getLogger(__name__)

_FORCED = Forced[tuple[Phase | None, str]]()


@dataclass(frozen=True)
class Candidate:
    """A backend that was looked at.

    Attributes:
        name: the backend's.
        reasons: why it cannot be used; empty: it can.
    """

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how.

    Attributes:
        backend: the chosen one.
        because: "forced in code", "configured", "measured fastest" or "first by priority".
        candidates: every backend that was looked at, in the order of preference.
    """

    backend: type[AttentionBackend]
    because: str
    candidates: tuple[Candidate, ...]


@contextmanager
def force_attn_backend(name: str, phase: Phase | None = None) -> Iterator[None]:
    """Make `select_backend` take this backend or fail, whatever the configuration says, on every thread of the process.

    The block that was entered last wins: one for both phases over all before it, one for a phase over those for it and
    for both. Other processes, those of Ray's actors among them, are not reached: they are configured.

    Args:
        name: the backend's.
        phase: for prefill or for decode only; None: for both.

    Raises:
        AttentionBackendError: no such backend.
    """
    get_backend(name)
    with _FORCED.force((phase, name)):
        yield


def forced_backend(phase: Phase | None) -> str | None:
    """The name that code forces for such batches; None: none."""
    return next((name for kind, name in reversed(_FORCED.values()) if kind in (phase, None)), None)


def select_backend(
    platform: Platform,
    needs: AttentionNeeds | Sequence[AttentionNeeds],
    configured: str | None = None,
    fastest: Sequence[str] = (),
) -> Selection:
    """Choose the backend of a model: `force_attn_backend`, else `configured`, else the best that can run it.

    Args:
        platform: where the model runs.
        needs: of every kind of layer that the model has; the backend must run all of them.
        configured: a name from the configuration.
        fastest: backends as measured on this device for this model, fastest first; they come before all others.

    Raises:
        AttentionBackendError: an unknown name, a forced backend that refuses, or none that is usable; with reasons.
    """
    kinds = [needs] if isinstance(needs, AttentionNeeds) else list(needs)
    in_code = forced_backend(kinds[0].phase)
    name = in_code or configured
    if name is not None:
        reasons = unsupported_reasons(name, platform, kinds) or get_backend(name).faults(platform)
        if reasons:
            raise AttentionBackendError(f"attention backend {name} cannot run this model: {'; '.join(reasons)}")
        return Selection(get_backend(name), "forced in code" if in_code else "configured", (Candidate(name, ()),))
    order = dict.fromkeys(candidate for kind in kinds for candidate in candidates(platform, kind))
    measured = [name for name in fastest if name in order]
    looked_at = [
        Candidate(name, tuple(unsupported_reasons(name, platform, kinds)))
        for name in dict.fromkeys([*measured, *order])
    ]
    chosen = None
    for i, candidate in enumerate(looked_at):
        # Libraries are imported for what would be chosen alone: for some that takes seconds.
        if chosen is None and not candidate.reasons:
            faults = tuple(get_backend(candidate.name).faults(platform))
            looked_at[i] = Candidate(candidate.name, faults)
            chosen = None if faults else candidate.name
    if chosen is None:
        why = "; ".join(f"{candidate.name}: {', '.join(candidate.reasons)}" for candidate in looked_at)
        raise AttentionBackendError(f"no attention backend for {platform}: {why or 'none is made for it'}")
    because = "measured fastest" if chosen in measured else "first by priority"
    return Selection(get_backend(chosen), because, tuple(looked_at))


def unsupported_reasons(name: str, platform: Platform, needs: Sequence[AttentionNeeds]) -> list[str]:
    """Why the backend of that name cannot run all of these there; empty when it can.

    Raises:
        AttentionBackendError: no such backend.
    """
    backend = get_backend(name)
    reasons: dict[str, None] = {}
    for kind in needs:
        reasons.update(dict.fromkeys(backend.refuse(platform, kind)))
    return list(reasons)


def log_selection(selection: Selection, where: str) -> None:
    """Say once, at INFO, what was chosen and why, and at DEBUG what was not."""
    logger.info("attention backend of %s: %s (%s)", where, selection.backend.name, selection.because)
    for candidate in selection.candidates:
        if candidate.reasons:
            logger.debug("attention backend %s refused: %s", candidate.name, "; ".join(candidate.reasons))
