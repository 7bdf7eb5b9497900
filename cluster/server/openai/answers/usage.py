"""What a request has cost, in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.generation.text_chunk import TextChunk


class UsageCount:
    """Tokens of one request, which may have several prompts and several answers to each.

    Args:
        prompt_tokens: of each prompt; a prompt counts once, however many answers it has.
    """

    def __init__(self, prompt_tokens: Iterable[int]) -> None:
        self.prompt_tokens = sum(prompt_tokens)
        self.completion_tokens = 0
        self.cached_tokens = 0

    def add(self, chunk: TextChunk) -> None:
        """Count a part of an answer; one of those to each prompt says what it found in prefix caches."""
        self.completion_tokens += len(chunk.tokens)
        if chunk.report is not None:
            self.cached_tokens += chunk.report.cached_tokens

    def completion(self) -> dict[str, Any]:
        """As completions and chats have it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def response(self) -> dict[str, Any]:
        """As /v1/responses has it."""
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
