"""Whose a KV cache is: keys and values mean something only to the model that computed them."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

DIGEST_BYTES = 16


@dataclass(frozen=True)
class KVIdentity:
    """What gives the numbers in a cache their meaning, each part as the digest of all of it, in hexadecimal digits.

    Two caches of one form and of unlike identities hold numbers that must never be mixed: other weights of equal shape
    fill them with something else. An empty part says nothing, and is like an empty part alone.

    Attributes:
        version: of what Baton itself puts into a cache; raised with every change of it.
        weights: of the parameters of this rank.
        config: of the model's settings, and the frequencies of its rotary embeddings as they are applied.
        tokenizer: of the files that turn text into token ids.
        dtype: what keys and values are computed in.
        kv_scales: of the scales with which an FP8 cache is written.
    """

    version: str = ""
    weights: str = ""
    config: str = ""
    tokenizer: str = ""
    dtype: str = ""
    kv_scales: str = ""

    def differences(self, other: KVIdentity) -> list[str]:
        """Each part in which the two differ, in words."""
        return [
            f"{field.name} is {getattr(self, field.name) or 'unknown'} here"
            f" and {getattr(other, field.name) or 'unknown'} there"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    @property
    def digest(self) -> bytes:
        """`DIGEST_BYTES` bytes that cover every part."""
        return hashlib.blake2b(repr(dataclasses.astuple(self)).encode(), digest_size=DIGEST_BYTES).digest()


UNKNOWN = KVIdentity()
"""Of caches that no model fills: all of them are alike."""


def digest_of(*parts: bytes) -> str:
    """The digest of byte strings in order, each with its length: 32 hexadecimal digits."""
    running = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        running.update(len(part).to_bytes(8, "little"))
        running.update(part)
    return running.hexdigest()
