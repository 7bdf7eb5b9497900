"""What a serialised request may have, before it is parsed."""

import pytest

from cluster.conversation.messages import MAX_MESSAGES
from cluster.wire.bounds import MAX_FIELDS, MAX_PROMPT_TOKEN_IDS, MAX_TEMPLATE_VALUES, SMALL_BYTES, check_bounds
from protos import baton_pb2
from workers.errors import InvalidRequestError
from workers.sampling_params import MAX_BAD_WORDS, MAX_LISTED_TOKENS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

REQUEST = baton_pb2.GenerateRequest
PADDING = REQUEST(text="x" * SMALL_BYTES).SerializeToString()  # small ones are not looked at


def chat(**fields) -> bytes:
    return REQUEST(chat=baton_pb2.ChatMessages(**fields)).SerializeToString()


def sampling(**fields) -> bytes:
    return REQUEST(sampling=baton_pb2.SamplingParams(**fields)).SerializeToString()


def check(raw: bytes) -> None:
    check_bounds(PADDING + raw, REQUEST.DESCRIPTOR)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


MESSAGE = baton_pb2.ChatMessage()
AT_MOST = [
    (lambda n: chat(messages=[MESSAGE] * n), MAX_MESSAGES, "messages"),
    (lambda n: sampling(stop=["x"] * n), MAX_STOP_STRINGS, "stop"),
    (lambda n: sampling(stop_token_ids=[300] * n), MAX_STOP_TOKEN_IDS, "stop_token_ids"),
    (lambda n: sampling(bad_words=["x"] * n), MAX_BAD_WORDS, "bad_words"),
    (lambda n: sampling(logit_bias=[baton_pb2.LogitBias()] * n), MAX_LISTED_TOKENS, "logit_bias"),
    (lambda n: sampling(allowed_token_ids=[2**31] * n), MAX_LISTED_TOKENS, "allowed_token_ids"),
    (lambda n: REQUEST(token_ids=baton_pb2.TokenIds(ids=[7] * n)).SerializeToString(), MAX_PROMPT_TOKEN_IDS, "ids"),
]


@pytest.mark.parametrize(("make", "most", "name"), AT_MOST)
def test_as_many_as_are_allowed_pass_and_one_more_does_not(make, most: int, name: str) -> None:
    check(make(most))
    with pytest.raises(InvalidRequestError, match=rf"{name} has {most + 1} entries or more, at most {most} are"):
        check(make(most + 1))


def test_what_is_nested_is_counted_wherever_it_is() -> None:
    deep = chat()
    kwargs = baton_pb2.ChatMessages().chat_template_kwargs
    kwargs["a"] = [{"b": list(range(MAX_TEMPLATE_VALUES))}]
    deep = chat(chat_template_kwargs=kwargs)
    with pytest.raises(InvalidRequestError, match=f"values has {MAX_TEMPLATE_VALUES + 1} entries or more"):
        check(deep)
    calls = [baton_pb2.ChatMessage(tool_calls=[baton_pb2.ToolCall()] * 128)] * 65
    with pytest.raises(InvalidRequestError, match=r"tool_calls has 8193 entries or more, at most 8192"):
        check(chat(messages=calls))


def test_a_field_that_comes_in_parts_is_counted_once() -> None:
    """Parsers join the parts of a message, so that a bound for each of them would be none."""
    part = chat(messages=[MESSAGE] * 100)
    check(part * (MAX_MESSAGES // 100))
    with pytest.raises(InvalidRequestError, match="messages has"):
        check(part * (MAX_MESSAGES // 100 + 1))


def test_numbers_that_are_not_packed_are_counted_too() -> None:
    unpacked = (varint(10 << 3) + varint(300)) * (MAX_STOP_TOKEN_IDS + 1)
    assert len(baton_pb2.SamplingParams.FromString(unpacked).stop_token_ids) == MAX_STOP_TOKEN_IDS + 1
    with pytest.raises(InvalidRequestError, match="stop_token_ids has"):
        check(delimited(6, unpacked))


def test_fields_that_have_no_bound_of_their_own_have_one_together() -> None:
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_FIELDS} fields"):
        check(delimited(3, b"") * (MAX_FIELDS + 1))


def test_what_is_no_request_is_left_to_who_parses_it() -> None:
    request = REQUEST(
        request_id="r", sampling=baton_pb2.SamplingParams(temperature=0.5, seed=2**64 - 1)
    ).SerializeToString()
    for wrong in (b"\xff" * 40, b"\x22\xff\xff\x03", b"\x23\x23\x24", b"\x08" + b"\xff" * 11, request[:-3]):
        check(wrong)
    check(request)


def test_what_a_small_request_has_is_counted_where_it_is_read() -> None:
    check_bounds(sampling(stop=["x"] * (MAX_STOP_STRINGS + 1)), REQUEST.DESCRIPTOR)
