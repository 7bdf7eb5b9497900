"""Parts of answers, as they go from the gateway to the doors."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.api import RequestReport, Usage
from cluster.conversation.deltas import Delta
from cluster.generation.marker_positions import Markers
from cluster.generation.prompt_positions import PromptPosition
from workers.messages import FinishReason, TokenOutput


@dataclass(slots=True)
class TextChunk:
    """A part of an answer, not to be written to (`frozen` would cost more than all else that is done for a token).

    Of several samples each has parts of its own, the last of them with its finish reason.

    Attributes:
        text: what comes behind the text so far.
        tokens: since the part before.
        finish_reason: why the answer ended; None: it goes on.
        stop_reason: the stop string, or the one of the request's stop tokens, that ended it; None: something else.
        usage: of the request, in the last part of all.
        report: where the request went, in the last part of all.
        markers: special tokens of the model's formats, and where they stand in the text, which is without them.
        deltas: of a conversation's answer, what the text says; None where all of it is content.
        index: the sample that it is a part of.
        prompt_logprobs: of the prompt's tokens from the second on, in the first part of all, if they were asked for.
    """

    text: str
    tokens: tuple[TokenOutput, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    report: RequestReport | None = None
    markers: Markers = ()
    deltas: tuple[Delta, ...] | None = None
    index: int = 0
    prompt_logprobs: tuple[PromptPosition, ...] | None = None
