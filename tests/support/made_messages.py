"""Protobuf messages of every kind: each field of its type, with the values that break programs among the others."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

TEXTS = (
    *(
        "",
        "x",
        "ada 4127; ada?",
        "\x00",
        "\x1b[2J",
        "a\r\nb: c",
        "é" * 70,
        "x" * 200,
        "{{ 1 }}",
        "{% for %}",
        "<|eos|>",
    ),
    *("{", "[" * 300, '{"type": "object"}', "(a*)*b", "a{1,9999999}", "auto", "prefill", "\u202e", "𝔘", "NaN"),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, 2.5, 101.0)
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MAX_DEPTH = 4


def made(descriptor: Descriptor, most_fields: int = 5, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """The fields of a message, as its constructor takes them."""
    fields = [field for field in descriptor.fields if depth < _MAX_DEPTH or field.message_type is None]

    def of(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: values(descriptor.fields_by_name[name], depth) for name in names})

    names = st.lists(st.sampled_from([field.name for field in fields]), max_size=most_fields, unique=True)
    return names.flatmap(of) if fields else st.just({})


def values(field: FieldDescriptor, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a field."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return st.dictionaries(single(entry["key"], depth), single(entry["value"], depth + 1), max_size=2)
    one = single(field, depth)
    return st.lists(one, max_size=3) if field.is_repeated else one


def single(field: FieldDescriptor, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a field that is there once."""
    kind = field.cpp_type
    if kind in _BOUNDS:
        low, high = _BOUNDS[kind]
        return st.one_of(st.sampled_from((low, high, 0, 1, 2)), st.integers(max(low, -3), 70), st.integers(low, high))
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return made(field.message_type, depth=depth + 1)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=300)
        return st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=("Cs",)), max_size=5))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.sampled_from([0, 1, 2, 77])
    return st.one_of(st.sampled_from(FLOATS), st.floats())
