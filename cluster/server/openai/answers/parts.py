"""Parts of answers, whatever the endpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.generation.text_chunk import TextChunk


@dataclass(frozen=True)
class Head:
    """What an answer and all its events begin with.

    Attributes:
        id: of the answer.
        model: that was served.
        created: seconds since 1970.
    """

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str) -> dict[str, Any]:
        """The fields, for an object of this kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def joined(chunks: Sequence[TextChunk]) -> TextChunk:
    """All parts of an answer as one."""
    last = chunks[-1]
    return TextChunk(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.tokens),
        last.finish_reason,
        last.stop_reason,
        last.usage,
        last.report,
        prompt_logprobs=next((chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None), None),
        deltas=None if last.deltas is None else tuple(delta for chunk in chunks for delta in chunk.deltas or ()),
    )


def token_ids_of(chunk: TextChunk) -> list[int]:
    """Its tokens."""
    return [token.token_id for token in chunk.tokens]


def ending(chunk: TextChunk) -> dict[str, Any]:
    """Why an answer ended; both are null while it goes on."""
    reason = chunk.finish_reason
    return {"finish_reason": None if reason is None else reason.value, "stop_reason": chunk.stop_reason}
