"""How many workers the GPUs of a cluster hold, where no nodes come for them.

A worker's share of a GPU is decided when the service starts, for the workers that it starts with. What is left then
bounds how far a group can grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from workers.errors import InvalidRequestError

_WHOLE = 10_000  # Ray counts GPUs in ten-thousandths


class Share(NamedTuple):
    """What each worker of a group takes: so many ranks with so many GPUs each."""

    ranks: int
    gpus: float


@dataclass
class GpuBudget:
    """The GPUs, and what the workers take of them.

    Attributes:
        total: GPUs of the cluster; may change while the service runs.
        shares: by group, for those whose nodes do not come when they are needed.
    """

    total: float
    shares: Mapping[str, Share]

    def check(self, targets: Mapping[str, int]) -> None:
        """Refuse targets for which the GPUs do not suffice.

        Args:
            targets: of all groups.

        Raises:
            InvalidRequestError: they do not.
        """
        if self._suffices(targets):
            return
        wanted = " and ".join(
            f"{targets[group]} × {share.ranks * share.gpus:g} for {group}" for group, share in self.shares.items()
        )
        raise InvalidRequestError(
            f"the workers would need more GPUs than there are: {wanted}, the Ray cluster has {self.total:g}; "
            "a worker's share is reckoned when the service starts, from replicas: begin with as many as you will want, "
            "or set num_gpus"
        )

    def most(self, group: str, targets: Mapping[str, int], limit: int) -> int:
        """How many workers a group can have, at most `limit`, where the others have their targets."""
        if group not in self.shares:
            return limit
        counts = range(limit + 1)
        return max(0, bisect_left(counts, True, key=lambda n: not self._suffices({**targets, group: n})) - 1)

    def _suffices(self, targets: Mapping[str, int]) -> bool:
        """Whether all ranks fit, the largest first, each part of a GPU on one that has it left."""
        ranks = [(max(1, round(s.gpus * _WHOLE)), targets[group] * s.ranks) for group, s in self.shares.items()]
        left = [_WHOLE] * int(self.total)
        for size, count in sorted(ranks, reverse=True):
            if size > _WHOLE:
                whole = -(-size // _WHOLE) * count
                if whole > len(left):
                    return False
                del left[:whole]  # the largest come first: all that is left is whole
                continue
            for gpu, free in enumerate(left):
                taken = min(count, free // size)
                left[gpu] -= taken * size
                count -= taken
            if count:
                return False
        return True
