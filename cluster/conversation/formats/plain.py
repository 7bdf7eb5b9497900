"""No calls: everything is content."""

from __future__ import annotations

from cluster.conversation.writer import AnswerWriter


class PlainParser:
    """Takes everything for content."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer

    def push(self, part: str) -> None:
        """Take more content."""
        self._writer.content(part)

    def finish(self) -> None:
        """The answer is over."""
