"""Whether an actor that has not answered yet waits for room, or has a process that should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray._private import state


def have_processes(actors: Sequence[Any]) -> bool:
    """Whether Ray has given each of these actors a process, as its control service (GCS) says; asks over the network.

    Nothing public says so: an actor's state is PENDING_CREATION before and after.
    """
    return all(_address_of(actor).get("Port") for actor in actors)


def _address_of(actor: Any) -> dict[str, Any]:
    known = state.actors(actor._actor_id.hex())
    return known.get("Address") or {}
