"""What can be said of a handoff, likely and unlikely, and what becomes of it on a bad way."""

from __future__ import annotations

from hypothesis import strategies as st

from handoff_world import LAYERS
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Hello, Message, Part
from kv_transfer.handoff_key import HandoffKey

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
small = st.integers(0, 3)
KEY = HandoffKey(b"k" * 16, 1, 1)


def _messages() -> st.SearchStrategy[Message]:
    key, numbers = st.just(KEY), st.one_of(small, small, u32)
    blocks = st.builds(GroupBlocks, small, st.lists(numbers, min_size=1, max_size=3).map(tuple))
    return st.one_of(
        st.just(Cancel(KEY)),
        st.builds(Closed, key, st.text(max_size=5)),
        st.builds(Grant, key, st.lists(blocks, min_size=1, max_size=1).map(tuple)),
        st.builds(Final, key, small, small),
        st.builds(Part, key, small, st.just(0), st.just(0), st.just(LAYERS), small, small),
        st.builds(Hello, key, st.booleans()),
        st.builds(Grant, key, st.lists(blocks, max_size=3).map(tuple)),
        st.builds(Final, key, u32, numbers, st.lists(u32, max_size=2).map(tuple)),
        st.builds(Part, key, numbers, u16, u16, u16, numbers, numbers),
    )


MESSAGES = _messages()
"""Anything that can be said of a handoff, likely and unlikely."""
CHANGES = st.lists(
    st.tuples(st.sampled_from(("flip", "cut", "grow")), st.integers(0, 60), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=3,
)
NOISE = st.binary(max_size=60)


def changed(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """A message as a broken network or a broken program would send it."""
    message = bytearray(data)
    for what, place, junk in changes:
        place %= len(message) + 1
        match what:
            case "flip" if place < len(message):
                message[place] ^= junk[0] or 1
            case "cut":
                del message[place : place + len(junk)]
            case _:
                message[place:place] = junk
    return bytes(message)
