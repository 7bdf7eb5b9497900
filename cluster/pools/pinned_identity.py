"""Whose KV cache the workers of a service keep: that of the first one to start, for as long as the gateway runs."""

from __future__ import annotations

from kv_transfer.identity import KVIdentity, digest_of
from workers.errors import ConfigError
from workers.worker_host import WorkerInfo


class PinnedIdentity:
    """Refuses workers that were loaded from something else than those before them, which may be gone by now.

    A folder whose weights were replaced while the service ran would otherwise be what lost workers are replaced from,
    and a request that began on the old ones would go on with the new. Ranks hold different parts of the weights, so
    each number of ranks has an identity for each of them.

    Args:
        tokenizer: the digest of the tokenizer that this process turns text into ids with, which the workers' must be;
            None: it does not, or nobody knows.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._ranks: dict[int, tuple[KVIdentity, ...]] = {}

    @property
    def digest(self) -> bytes:
        """Of the first worker, all of its ranks; it stands for the model that is served. Empty before there is one."""
        for ranks in self._ranks.values():
            return bytes.fromhex(digest_of(*(rank.digest for rank in ranks)))
        return b""

    def check(self, info: WorkerInfo) -> None:
        """Accept a worker, or refuse it.

        Raises:
            ConfigError: its identity is not the one that is served, or its tokenizer not the one that is served with;
                names the worker and every part that differs.
        """
        ranks = tuple(engine.layout.identity for engine in info.engines)
        if self._tokenizer is not None and any(rank.tokenizer != self._tokenizer for rank in ranks):
            raise ConfigError(
                f"{info.name} was loaded beside another tokenizer than the one that texts are turned into tokens with: "
                f"its digest is {ranks[0].tokenizer or 'unknown'} there and {self._tokenizer or 'unknown'} here; "
                "give all machines the same files, and restart the service if they were changed"
            )
        pinned = self._ranks.setdefault(len(ranks), ranks)
        differences = [what for served, found in zip(pinned, ranks, strict=True) for what in found.differences(served)]
        if differences:
            raise ConfigError(
                f"{info.name} was loaded from another model than the one that is served: "
                f"{'; '.join(dict.fromkeys(differences))}; to serve it, restart the service"
            )
