import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.errors import LayoutMismatchError, ProtocolError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Hello, Part, decode, encode
from kv_transfer.handoff.part_counter import PartCounter, Wanted
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout

u32 = st.integers(0, 2**32 - 1)
u16 = st.integers(0, 2**16 - 1)
u64 = st.integers(0, 2**64 - 1)
keys = st.builds(HandoffKey, st.binary(min_size=16, max_size=16), u64, u64)
blocks = st.builds(GroupBlocks, u32, st.lists(u32, max_size=200).map(tuple))
messages = st.one_of(
    st.builds(Hello, keys, st.booleans()),
    st.builds(Grant, keys, st.lists(blocks, max_size=4).map(tuple)),
    st.builds(Part, keys, u32, u16, u16, u16, u32, u32),
    st.builds(Final, keys, u32, u32, st.lists(u32, max_size=5).map(tuple)),
    st.builds(Cancel, keys),
    st.builds(Closed, keys, st.text(max_size=100)),
)


@given(messages)
def test_every_message_survives_the_wire(message):
    assert decode(encode(message)) == message


@given(st.binary(max_size=100))
def test_noise_is_refused_or_understood_but_never_worse(data):
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert encode(message)[:1] == data[:1]


def test_another_version_is_refused_readably():
    data = bytearray(encode(Cancel(HandoffKey(b"x" * 16, 1, 1))))
    data[0] = 9
    with pytest.raises(ProtocolError, match="version 9"):
        decode(bytes(data))


def test_a_long_reason_is_cut():
    closed = decode(encode(Closed(HandoffKey(b"x" * 16, 1, 1), "ü" * 1000)))
    assert isinstance(closed, Closed)
    assert 200 < len(closed.reason) <= 512


KEY = HandoffKey(b"k" * 16, 7, 1)


@given(st.permutations(list(range(6))), st.lists(st.integers(0, 5), max_size=10), st.integers(0, 6))
def test_the_ledger_is_complete_only_when_everything_was_counted(order, repeats, final_at):
    """3 layers × 4 blocks in 2 chunks: any order, any repeats, the last message at any place."""
    parts = [Part(KEY, i, 0, i % 3, 1, 2 * (i // 3), 2) for i in range(6)]
    ledger = PartCounter([Wanted(3, range(4))])
    for step, index in enumerate(order):
        if step == final_at:
            ledger.close(Final(KEY, 42, 6))
        assert ledger.first_token is None
        ledger.count(parts[index])
        for repeat in repeats:
            if repeat in order[: step + 1]:
                ledger.count(parts[repeat])
    if final_at == 6:
        assert ledger.first_token is None
        ledger.close(Final(KEY, 42, 6))
    assert ledger.first_token == 42


@pytest.mark.parametrize("part", [(0, 2, 0, 3), (0, 2, 1, 2), (0, 2, 4, 3), (1, 2, 3, 2), (0, 2, 7, 2)])
def test_a_part_beyond_what_is_wanted_counts_for_nothing(part):
    """Two layers of the blocks 3 to 5 are wanted."""
    ledger = PartCounter([Wanted(2, range(3, 6))])
    ledger.count(Part(KEY, 0, 0, *part))
    ledger.close(Final(KEY, 5, 1))
    assert ledger.first_token is None
    ledger.count(Part(KEY, 1, 0, 0, 2, 3, 3))
    assert ledger.first_token == 5


def test_where_nothing_is_wanted_the_last_message_completes():
    ledger = PartCounter([Wanted(2, range(3, 3))])
    assert ledger.first_token is None
    ledger.close(Final(KEY, 5, 0))
    assert ledger.first_token == 5


def test_a_grant_without_its_first_block_is_malformed():
    grant = encode(Grant(KEY, (GroupBlocks(7, ()),)))
    assert decode(grant) == Grant(KEY, (GroupBlocks(7, ()),))
    with pytest.raises(ProtocolError, match="malformed"):
        decode(grant[:-1])


def test_a_sender_that_miscounts_does_not_complete():
    ledger = PartCounter([Wanted(2, range(2))])
    ledger.count(Part(KEY, 0, 0, 0, 2, 0, 1))
    ledger.close(Final(KEY, 5, 1))
    assert ledger.first_token is None, "one of two blocks is missing, whatever the sender says"


def test_each_group_must_be_complete_whatever_the_sender_says():
    counter = PartCounter([Wanted(2, range(2)), Wanted(1, range(3, 5))])
    counter.count(Part(KEY, 0, 0, 0, 2, 0, 2))
    counter.close(Final(KEY, 5, 1))
    assert counter.first_token is None
    counter.count(Part(KEY, 1, 2, 0, 1, 3, 2))
    assert counter.first_token is None, "there is no third group"
    counter.count(Part(KEY, 2, 1, 0, 1, 3, 2))
    assert counter.first_token == 5


LAYOUT = KVLayout((GroupLayout("full", tuple(range(4)), 16, 2, 64, "bfloat16"),))


def test_block_bytes():
    assert LAYOUT.primary.block_bytes == 2 * 16 * 2 * 64 * 2


def test_layouts_are_compared_field_by_field():
    other = KVLayout((GroupLayout("full", tuple(range(4)), 32, 2, 64, "float16"),))
    with pytest.raises(LayoutMismatchError) as error:
        LAYOUT.check_compatible(other, "decode-0.abc")
    assert "decode-0.abc" in str(error.value)
    assert "block_size is 16 here and 32 there" in str(error.value)
    assert "dtype is bfloat16 here and float16 there" in str(error.value)
    assert "head_size" not in str(error.value)
    LAYOUT.check_compatible(KVLayout((GroupLayout("full", tuple(range(4)), 16, 2, 64, "bfloat16"),)), "same")
