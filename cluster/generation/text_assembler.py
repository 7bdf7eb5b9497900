"""From tokens to the text of one answer: detokenised, up to a stop string, with the places of its markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from cluster.generation.marker_positions import MarkerPositions
from cluster.generation.text_chunk import TextChunk
from cluster.text.detokenizer import IncrementalDetokenizer
from cluster.text.stop import StopStrings
from cluster.text.tokenizer import Tokenizer
from workers.messages import FinishReason, TokenOutput
from workers.sampling_params import SamplingParams
from workers.token_ids import TokenIds


class TextAssembler:
    """The text of one answer, token by token, up to a stop string.

    Args:
        tokenizer: whose tokens they are.
        sampling: says what ends the text.
        prompt: what the answer continues; None: some text or other.
        eos_token_ids: what ends it in any case.
        markers: special tokens whose places are wanted, by id.

    Attributes:
        finish_reason: why the text ended; None while it goes on.
        stop_reason: see `TextChunk`.
        stopped: a stop string was found; what comes after it is not part of the answer.
        num_tokens: tokens taken.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt: TokenIds | None = None,
        eos_token_ids: Sequence[int] = (),
        markers: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.stopped = False
        self.num_tokens = 0
        shown = tokenizer if sampling.skip_special_tokens else tokenizer.with_special_tokens
        self._detokenizer = IncrementalDetokenizer(shown, tokenizer.anchor if prompt is None else prompt)
        self._show_stop = sampling.include_stop_str_in_output
        self._stops = StopStrings(sampling.stop, include=self._show_stop)
        self._stop_token_ids = set(sampling.stop_token_ids).difference(() if sampling.ignore_eos else eos_token_ids)
        special = tokenizer.special_token_ids
        self._stop_strings = {special[stop]: stop for stop in sampling.stop if stop in special}
        self._min_tokens = sampling.min_tokens
        self._markers = markers
        self._positions = MarkerPositions()
        self._plain = not sampling.stop and not markers

    def push(self, tokens: Sequence[TokenOutput]) -> TextChunk:
        """Take tokens up to the one that completes a stop string, and return them with the text that is certain."""
        if len(tokens) == 1 and self._plain and (only := tokens[0]).finish_reason is None:
            self.num_tokens += 1
            return TextChunk(self._detokenizer.push((only.token_id,)), (only,))
        text = ""
        for position, token in enumerate(tokens):
            self.num_tokens += 1
            self.finish_reason = token.finish_reason
            # The token that ended the text is not part of it, unless that is wanted.
            if token.finish_reason is FinishReason.STOP and token.token_id in self._stop_token_ids:
                self.stop_reason = self._stop_strings.get(token.token_id, token.token_id)
            if token.finish_reason is not FinishReason.STOP or self._show_stop:
                if marker := self._markers.get(token.token_id):
                    # What is held back stands before it, whatever that turns out to be.
                    text += self._scan(self._detokenizer.finish())
                    self._positions.add(marker, len(text) + self._stops.num_held)
                text += self._scan(self._detokenizer.push([token.token_id]))
            if self.stopped:
                tokens = tokens[: position + 1]
                break
        return TextChunk(text, tuple(tokens), markers=self._positions.send(len(text)))

    def end(self, last: TextChunk) -> TextChunk:
        """The last part, with what had been held back."""
        rest = self.finish()
        markers = [(len(last.text) + position, marker) for position, marker in self._positions.send(len(rest))]
        return replace(last, text=last.text + rest, markers=(*last.markers, *markers))

    def finish(self) -> str:
        """The rest of the text: what had been held back."""
        if self.stopped:
            return ""
        return self._scan(self._detokenizer.finish()) + self._stops.finish()

    def _scan(self, text: str) -> str:
        kept, self.stopped = self._stops.push(text, may_end=self.num_tokens >= self._min_tokens)
        if self.stopped:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._stops.found
        return kept
