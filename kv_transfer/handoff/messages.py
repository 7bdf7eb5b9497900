"""What two workers tell each other about a handoff, and its encoding.

Messages travel as NIXL notifications, which arrive in any order. They are packed with `struct`, never pickled, so that
nothing that arrives can do more than be refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kv_transfer.errors import ProtocolError
from kv_transfer.handoff_key import HandoffKey

_VERSION = 2
_HEADER = struct.Struct("<BB16sQI")
_GRANT = struct.Struct("<I")
_PART = struct.Struct("<IHHII")
_FINAL = struct.Struct("<II")
_MAX_REASON_BYTES = 512


@dataclass(frozen=True)
class Hello:
    """First contact: proves that the path works in both directions."""

    key: HandoffKey
    reply: bool


@dataclass(frozen=True)
class Grant:
    """Decode → prefill: these blocks are yours to write to, in the order of the sequence.

    Attributes:
        key: the reservation.
        block_ids: for the sequence's blocks from `first_block` to its last; those before it are not to be written.
        first_block: how many of the sequence's blocks the decode worker has already.
    """

    key: HandoffKey
    block_ids: tuple[int, ...]
    first_block: int = 0


@dataclass(frozen=True)
class Part:
    """Prefill → decode, attached to a WRITE: this rectangle of (layers × blocks of the sequence) has landed."""

    key: HandoffKey
    index: int
    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True)
class Final:
    """Prefill → decode: the first token, and how many parts were written in all."""

    key: HandoffKey
    first_token: int
    num_parts: int


@dataclass(frozen=True)
class Cancel:
    """Decode → prefill: stop writing, and confirm with `Closed`."""

    key: HandoffKey


@dataclass(frozen=True)
class Closed:
    """Prefill → decode: nothing of this handoff is in flight and nothing more will be written."""

    key: HandoffKey
    reason: str


Message = Hello | Grant | Part | Final | Cancel | Closed
_KINDS: tuple[type, ...] = (Hello, Grant, Part, Final, Cancel, Closed)


def encode(message: Message) -> bytes:
    """The message as bytes."""
    key = message.key
    header = _HEADER.pack(_VERSION, _KINDS.index(type(message)), key.handoff_id, key.incarnation, key.generation)
    match message:
        case Hello(_, reply):
            return header + bytes([reply])
        case Grant(_, block_ids, first_block):
            return header + _GRANT.pack(first_block) + struct.pack(f"<{len(block_ids)}I", *block_ids)
        case Part(_, index, first_layer, num_layers, first_block, num_blocks):
            return header + _PART.pack(index, first_layer, num_layers, first_block, num_blocks)
        case Final(_, first_token, num_parts):
            return header + _FINAL.pack(first_token, num_parts)
        case Cancel():
            return header
        case Closed(_, reason):
            return header + reason.encode()[:_MAX_REASON_BYTES]


def decode(data: bytes) -> Message:
    """The message in `data`.

    Raises:
        ProtocolError: another version, an unknown kind or a wrong length.
    """
    try:
        version, kind, handoff_id, incarnation, generation = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ProtocolError(f"handoff message of version {version}; this worker speaks {_VERSION}")
        key = HandoffKey(handoff_id, incarnation, generation)
        return _decode_body(_KINDS[kind], key, data[_HEADER.size :])
    except (struct.error, IndexError) as error:
        raise ProtocolError(f"malformed handoff message of {len(data)} bytes: {error}") from error


def _decode_body(kind: type, key: HandoffKey, body: bytes) -> Message:
    if kind is Hello:
        return Hello(key, bool(body[0]))
    if kind is Grant:
        (first_block,) = _GRANT.unpack_from(body)
        block_ids = body[_GRANT.size :]
        return Grant(key, struct.unpack(f"<{len(block_ids) // 4}I", block_ids), first_block)
    if kind is Part:
        return Part(key, *_PART.unpack(body))
    if kind is Final:
        return Final(key, *_FINAL.unpack(body))
    if kind is Cancel:
        return Cancel(key)
    return Closed(key, body.decode(errors="replace"))
