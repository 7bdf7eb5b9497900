"""How much of what a serialised request may have, found out before it is parsed.

An empty message takes 2 bytes on the wire and hundreds when it is parsed, so that a bound on a request's bytes bounds
neither memory nor time. Here the wire format (https://protobuf.dev/programming-guides/encoding) is walked as far as it
has fields with a bound, and no further than the bounds let it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from cluster.conversation.messages import MAX_MESSAGES
from cluster.conversation.read_tools import MAX_TOOLS
from workers.errors import InvalidRequestError
from workers.sampling_params import MAX_BAD_WORDS, MAX_LISTED_TOKENS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from workers.structured_output import MAX_CHOICES

MAX_PROMPT_TOKEN_IDS = 2**21
"""Of a prompt that is given as token ids, more than any context window has."""
MAX_TEMPLATE_VALUES = 4096
"""Of `chat_template_kwargs`, however they are nested."""
MAX_CALLS_IN_ALL = 8192
"""Calls of tools in all messages of a conversation."""
MAX_FIELDS = 2**18
"""Fields that are looked at in one request, of whatever kind."""
SMALL_BYTES = 2**14
"""A request up to this size cannot have too much of anything; what it has is counted when it is read."""

_MOST: dict[str, int] = {
    "baton.v1.ChatMessages.messages": MAX_MESSAGES,
    "baton.v1.ChatMessages.tools": MAX_TOOLS,
    "baton.v1.ChatMessage.tool_calls": MAX_CALLS_IN_ALL,
    "baton.v1.TokenIds.ids": MAX_PROMPT_TOKEN_IDS,
    "baton.v1.SamplingParams.stop": MAX_STOP_STRINGS,
    "baton.v1.SamplingParams.stop_token_ids": MAX_STOP_TOKEN_IDS,
    "baton.v1.SamplingParams.logit_bias": MAX_LISTED_TOKENS,
    "baton.v1.SamplingParams.bad_words": MAX_BAD_WORDS,
    "baton.v1.SamplingParams.allowed_token_ids": MAX_LISTED_TOKENS,
    "baton.v1.Choice.texts": MAX_CHOICES,
    "google.protobuf.Struct.fields": MAX_TEMPLATE_VALUES,
    "google.protobuf.ListValue.values": MAX_TEMPLATE_VALUES,
}
_MAX_DEPTH = 100
"""As deep as protobuf's own parsers go."""
_LENGTH_DELIMITED, _GROUP = 2, 3
_FIXED_BYTES = {1: 8, 5: 4}


def check_bounds(raw: bytes, descriptor: Any) -> None:
    """Refuse a request that has too much of something.

    What is no request at all passes as far as it is not understood: who parses it will say so.

    Args:
        raw: as it came.
        descriptor: of its message.

    Raises:
        InvalidRequestError: names the field, how many there are at least, and the bound.
    """
    if len(raw) > SMALL_BYTES:
        _Walk(raw).through(descriptor)


@dataclass(frozen=True)
class _Field:
    """A field that is counted or looked into.

    Attributes:
        name: its full name.
        most: entries in one request; 0: it is not counted.
        packed: whether its entries are numbers, which may come together.
        inner: what is known of its message; None: its content has no bounds of its own.
    """

    name: str
    most: int
    packed: bool
    inner: dict[int, _Field] | None


@cache
def _fields_of(descriptor: Any) -> dict[int, _Field]:
    """The fields of a message that matter, by number; a message may contain itself."""
    fields: dict[int, _Field] = {}
    _KNOWN[descriptor.full_name] = fields
    for each in descriptor.fields:
        most = _MOST.get(each.full_name, 0)
        inner = None
        if each.message_type is not None:
            name = each.message_type.full_name
            inner = _KNOWN[name] if name in _KNOWN else _fields_of(each.message_type)
        if most or inner is not None:
            numbers = each.message_type is None and each.type not in (each.TYPE_STRING, each.TYPE_BYTES)
            fields[each.number] = _Field(each.full_name, most, numbers, inner)
    return fields


_KNOWN: dict[str, dict[int, _Field]] = {}


@dataclass
class _Walk:
    """One look at a request."""

    raw: bytes
    counts: Counter[str] = field(default_factory=Counter)
    looked_at: int = 0

    def through(self, descriptor: Any) -> None:
        parts = [(0, len(self.raw), _fields_of(descriptor), 0)]
        try:
            while parts:
                at, end, fields, depth = parts.pop()
                parts += self._message(at, end, fields, depth)
        except IndexError:
            return  # it ends in the middle of something

    def _message(
        self, at: int, end: int, fields: dict[int, _Field], depth: int
    ) -> list[tuple[int, int, dict[int, _Field], int]]:
        """Count the fields of a message; returns the messages in it that are to be looked at."""
        inside = []
        raw = self.raw
        while at < end:
            self.looked_at += 1
            if self.looked_at > MAX_FIELDS:
                raise InvalidRequestError(f"the request has more than {MAX_FIELDS} fields")
            key = raw[at]
            at += 1
            if key > 0x7F:
                key, at = self._number(key, at)
            kind, known = key & 7, fields.get(key >> 3)
            if kind == _LENGTH_DELIMITED:
                size = raw[at]
                at += 1
                if size > 0x7F:
                    size, at = self._number(size, at)
                begin, at = at, at + size
                if known is not None:
                    self._count(known, self._entries(known, begin, min(at, end)))
                    if known.inner and size and depth < _MAX_DEPTH:
                        inside.append((begin, min(at, end), known.inner, depth + 1))
                continue
            if kind == 0:
                value = raw[at]
                at += 1
                if value > 0x7F:
                    _, at = self._number(value, at)
            elif kind in _FIXED_BYTES:
                at += _FIXED_BYTES[kind]
            elif kind >= _GROUP:
                return inside  # groups are of no use here: who parses it decides
            if known is not None:
                self._count(known, 1)
        return inside

    def _entries(self, known: _Field, begin: int, end: int) -> int:
        """How many a length-delimited field has: of numbers, those whose last byte is in it."""
        if not known.packed:
            return 1
        return int(np.count_nonzero(np.frombuffer(self.raw, np.uint8, max(0, end - begin), begin) < 0x80))

    def _count(self, known: _Field, entries: int) -> None:
        if not known.most:
            return
        self.counts[known.name] += entries
        if self.counts[known.name] > known.most:
            name = known.name.rpartition(".")[2]
            raise InvalidRequestError(
                f"{name} has {self.counts[known.name]} entries or more, at most {known.most} are allowed"
            )

    def _number(self, first: int, at: int) -> tuple[int, int]:
        """A number of several bytes that begins with this one, and where it ends."""
        value, shift = first & 0x7F, 7
        while True:
            byte = self.raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise IndexError("no number has more than 10 bytes")
