"""What is in a simulated prompt: which family it belongs to, and how far it is like the others of its family.

Prompts of a family begin alike, each as far as it says, and go on in their own way. Nothing but three numbers is kept
of one, at the beginning of its token ids, and the hashes of its blocks are made of these.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cluster.routing.prefix_index import PromptPrefix
from workers.block_hashes import PromptHashes
from workers.token_ids import TokenIds, as_token_ids

_OWN = 1 << 120
_HEAD = 3


def prompt_of(num_tokens: int, family: int = 0, shared_tokens: int = 0, number: int = 0) -> TokenIds:
    """Token ids of a prompt. Without a family, or too short to say so, it is like no other and kept by nobody.

    Args:
        num_tokens: its length.
        family: 1 and above; 0: none.
        shared_tokens: so many at its beginning are the family's.
        number: of the request, which tells its other tokens from everybody's.
    """
    if not family or num_tokens < _HEAD:
        return _blank(num_tokens)
    return np.concatenate((as_token_ids((family, shared_tokens, number)), _blank(num_tokens - _HEAD)))


def content_hashes(token_ids: TokenIds, block_size: int) -> tuple[bytes, ...]:
    """One for each full block; none for a prompt without a family."""
    if len(token_ids) < _HEAD or not token_ids[0]:
        return ()
    family, shared_tokens, number = token_ids[:_HEAD].tolist()
    blocks = len(token_ids) // block_size
    common = min(shared_tokens // block_size, blocks)
    names = [family << 32 | i for i in range(common)] + [_OWN | number << 32 | i for i in range(common, blocks)]
    return tuple(name.to_bytes(16) for name in names)


class ContentPrefix(PromptPrefix):
    """As the router's index looks for such a prompt."""

    def followed_by(self, output: TokenIds) -> ContentPrefix:
        """See `PromptPrefix.followed_by`."""
        return ContentPrefix(np.concatenate((self._token_ids, output)))

    def carried(self, block_size: int) -> PromptHashes | None:
        """None: a simulated worker makes them of the token ids."""
        return None

    def hashes(self, block_size: int) -> tuple[bytes, ...]:
        """See `PromptPrefix.hashes`."""
        if (known := self._hashes.get(block_size)) is None:
            reusable = (len(self._token_ids) - 1) // block_size
            known = self._hashes[block_size] = content_hashes(self._token_ids, block_size)[:reusable]
        return known


@lru_cache(maxsize=4096)
def _blank(num_tokens: int) -> TokenIds:
    return as_token_ids(np.zeros(num_tokens, dtype=np.int32))
