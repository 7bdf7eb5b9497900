"""What the blocks of a sequence are known by: the hash of all tokens up to each block's end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from workers.token_ids import as_token_ids

HASH_BYTES = 16
_ROOT = b"salt"  # no salt can be chosen so that its hash is that of some block


@dataclass(frozen=True)
class PromptHashes:
    """The hashes of a prompt's full blocks as they travel to workers.

    Attributes:
        block_size: tokens in a block.
        digests: one after the other, `HASH_BYTES` each.
    """

    block_size: int
    digests: bytes


class PackedHashes(Sequence[bytes]):
    """Hashes that are taken apart only where they are looked at: a prompt of 131,072 tokens has 8,192 of them.

    Args:
        digests: one after the other.
    """

    def __init__(self, digests: bytes | bytearray) -> None:
        self._digests = digests

    @property
    def digests(self) -> bytes:
        """One after the other."""
        return bytes(self._digests)

    def __len__(self) -> int:
        return len(self._digests) // HASH_BYTES

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> PackedHashes: ...
    def __getitem__(self, place: int | slice) -> bytes | PackedHashes:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                raise ValueError(f"hashes are taken in steps of 1, not of {step}")
            return PackedHashes(bytes(self._digests[start * HASH_BYTES : stop * HASH_BYTES]))
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"hash {place} of {len(self)}")
        return bytes(self._digests[place * HASH_BYTES : (place + 1) * HASH_BYTES])

    def __iter__(self) -> Iterator[bytes]:
        digests = self._digests
        for start in range(0, len(digests), HASH_BYTES):
            yield bytes(digests[start : start + HASH_BYTES])


class BlockHashes(PackedHashes):
    """The hashes of a sequence's full blocks, continued as it grows.

    BLAKE2b, 128 bits, over the hash of the block before (of the first block: over that of the salt) and the block's
    token ids as little-endian int32: it covers all tokens up to the block's end, and going on takes the last hash
    alone. Finding two sequences with one hash takes about 2^64 attempts.

    Args:
        block_size: tokens in a block.
        salt: sequences of unlike salts share no hash.
        digests: those of the first blocks, as far as they are known.
    """

    def __init__(self, block_size: int, salt: bytes = b"", digests: bytes = b"") -> None:
        super().__init__(bytearray(digests))
        self.block_size = block_size
        self._last = digests[-HASH_BYTES:] or hashlib.blake2b(salt, digest_size=HASH_BYTES, person=_ROOT).digest()

    def copy(self) -> BlockHashes:
        """The same, to be continued in another way."""
        other = BlockHashes(self.block_size, digests=self.digests)
        other._last = self._last
        return other

    def extend(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Go on with these tokens, the first of which begins a block; what fills no block at their end is left out."""
        data = as_token_ids(token_ids).astype("<i4", copy=False).tobytes()
        width, last, found = 4 * self.block_size, self._last, []
        for start in range(0, len(data) - width + 1, width):
            last = hashlib.blake2b(last + data[start : start + width], digest_size=HASH_BYTES).digest()
            found.append(last)
        self._last = last
        self._digests += b"".join(found)


def block_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.integer], block_size: int, salt: bytes = b""
) -> tuple[bytes, ...]:
    """One hash for each full block of a prompt; see `BlockHashes`.

    Args:
        token_ids: (n,), the prompt.
        block_size: tokens in a block.
        salt: prompts of unlike salts share no hash.
    """
    running = BlockHashes(block_size, salt)
    running.extend(token_ids)
    return tuple(running)
