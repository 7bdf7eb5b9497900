"""Whose KV cache the workers of a service keep: that of the first one to start, for as long as the gateway runs."""

from __future__ import annotations

from kv_transfer.identity import KVIdentity
from workers.errors import ConfigError
from workers.worker_host import WorkerInfo


class PinnedIdentity:
    """Refuses workers that were loaded from something else than those before them, which may be gone by now.

    A folder whose weights were replaced while the service ran would otherwise be what lost workers are replaced from,
    and a request that began on the old ones would go on with the new. Ranks hold different parts of the weights, so
    each number of ranks has an identity for each of them.
    """

    def __init__(self) -> None:
        self._ranks: dict[int, tuple[KVIdentity, ...]] = {}

    def check(self, info: WorkerInfo) -> None:
        """Accept a worker, or refuse it.

        Raises:
            ConfigError: its identity is not the one that is served; names the worker and every part that differs.
        """
        ranks = tuple(engine.layout.identity for engine in info.engines)
        pinned = self._ranks.setdefault(len(ranks), ranks)
        differences = [what for served, found in zip(pinned, ranks, strict=True) for what in found.differences(served)]
        if differences:
            raise ConfigError(
                f"{info.name} was loaded from another model than the one that is served: "
                f"{'; '.join(dict.fromkeys(differences))}; to serve it, restart the service"
            )
