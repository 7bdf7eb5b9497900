"""What the router is told of the pools."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.pools.member import Member
from cluster.routing.router import Bar
from cluster.routing.worker_table import WorkerTraits


def traits_of(members: Iterable[Member]) -> dict[WorkerTraits, bool]:
    """The workers that have said who they are, and whether each is ready."""
    return {
        WorkerTraits(
            engine_id=member.engine_id,
            max_model_len=info.max_model_len,
            block_size=info.engine.layout.block_size,
            total_blocks=info.num_blocks,
            max_num_seqs=info.max_num_seqs,
            capability=info.capability,
        ): member.state == "ready"
        for member in members
        if (info := member.info) is not None
    }


def bars_of(members: Iterable[Member]) -> dict[tuple[str, str], Bar]:
    """The pairs that cannot work together, whichever of the two has found out."""
    bars: dict[tuple[str, str], Bar] = {}
    for member in members:
        known = [(peer, Bar(why, forever=False)) for peer, why in member.estranged.items()]
        known += [(peer, Bar(why, forever=True)) for peer, why in member.refusals.items()]
        for peer, bar in known:
            prefill, decode = (member.engine_id, peer) if member.handle.role == "prefill" else (peer, member.engine_id)
            bars[prefill, decode] = bar
    return bars
