"""What two workers tell each other about a handoff, and its encoding.

Messages travel as NIXL notifications, which arrive in any order. They are packed with `struct`, never pickled, so that
nothing that arrives can do more than be refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kv_transfer.errors import ProtocolError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey

_VERSION = 5
_HEADER = struct.Struct("<BB16sQQ")
_HELLO = struct.Struct("<?")
_GRANT = struct.Struct("<H")
_GRANT_GROUP = struct.Struct("<II")
_PART = struct.Struct("<IHHHII")
_FINAL = struct.Struct("<II")
_MAX_REASON_BYTES = 512


@dataclass(frozen=True)
class Hello:
    """First contact: proves that the path works in both directions."""

    key: HandoffKey
    reply: bool


@dataclass(frozen=True)
class Grant:
    """Decode → prefill: these blocks are yours to write to.

    Attributes:
        key: the reservation.
        groups: by cache group, the sequence's blocks to its last; those before them are not to be written.
    """

    key: HandoffKey
    groups: tuple[GroupBlocks, ...]


@dataclass(frozen=True)
class Part:
    """Prefill → decode, attached to a WRITE: this rectangle of (layers × blocks of the sequence) has landed.

    Attributes:
        key: the reservation.
        index: counts the parts of the handoff.
        group: the cache group.
        first_layer: its place among the layers of the group that the rank hands over, see `KVLayout.share`.
        num_layers: from there on.
        first_block: its place in the sequence.
        num_blocks: from there on.
    """

    key: HandoffKey
    index: int
    group: int
    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True)
class Final:
    """Prefill → decode: the first token, and how many parts were written in all.

    Attributes:
        key: the reservation.
        first_token: of the prompt's first sample.
        num_parts: WRITEs of the handoff.
        other_tokens: the first tokens of the prompt's other samples, in order.
    """

    key: HandoffKey
    first_token: int
    num_parts: int
    other_tokens: tuple[int, ...] = ()


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
            return header + _HELLO.pack(reply)
        case Grant(_, groups):
            return header + _GRANT.pack(len(groups)) + b"".join(map(_encode_blocks, groups))
        case Part(_, index, group, first_layer, num_layers, first_block, num_blocks):
            return header + _PART.pack(index, group, first_layer, num_layers, first_block, num_blocks)
        case Final(_, first_token, num_parts, others):
            return header + _FINAL.pack(first_token, num_parts) + struct.pack(f"<{len(others)}I", *others)
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
        (reply,) = _HELLO.unpack(body)
        return Hello(key, reply)
    if kind is Grant:
        return Grant(key, _decode_groups(body))
    if kind is Part:
        return Part(key, *_PART.unpack(body))
    if kind is Final:
        first_token, num_parts = _FINAL.unpack_from(body)
        others = body[_FINAL.size :]
        return Final(key, first_token, num_parts, struct.unpack(f"<{len(others) // 4}I", others))
    if kind is Closed:
        return Closed(key, body[:_MAX_REASON_BYTES].decode(errors="replace"))
    if body:
        raise struct.error(f"{len(body)} bytes behind a cancel")
    return Cancel(key)


def _encode_blocks(blocks: GroupBlocks) -> bytes:
    count = len(blocks.block_ids)
    return _GRANT_GROUP.pack(blocks.first_block, count) + struct.pack(f"<{count}I", *blocks.block_ids)


def _decode_groups(body: bytes) -> tuple[GroupBlocks, ...]:
    (num_groups,) = _GRANT.unpack_from(body)
    groups, at = [], _GRANT.size
    for _ in range(num_groups):
        first_block, count = _GRANT_GROUP.unpack_from(body, at)
        at += _GRANT_GROUP.size
        groups.append(GroupBlocks(first_block, struct.unpack_from(f"<{count}I", body, at)))
        at += 4 * count
    if at != len(body):
        raise struct.error(f"{len(body) - at} bytes behind a grant")
    return tuple(groups)
