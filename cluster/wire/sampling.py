"""Sampling parameters on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cluster.text.sampling_defaults import with_defaults
from protos import baton_pb2
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.structured_output import GrammarKind, StructuredOutput

_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
_INTERNAL = "bad_words_token_ids"


def sampling_to_proto(params: SamplingParams) -> baton_pb2.SamplingParams:
    """Every parameter that has a value is set, defaults too; what only the gateway fills in is not sent."""
    values = {field.name: getattr(params, field.name) for field in fields(params) if field.name != _INTERNAL}
    values = {name: value for name, value in values.items() if value is not None}
    values["logit_bias"] = [baton_pb2.LogitBias(token_id=token, bias=bias) for token, bias in params.logit_bias]
    if params.structured_output is not None:
        values["structured_output"] = _structured_output_to_proto(params.structured_output)
    return baton_pb2.SamplingParams(**values)


def sampling_from_proto(message: baton_pb2.SamplingParams, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """What is not set has its value in `defaults`, or else its default.

    Raises:
        InvalidRequestError: a value out of range.
    """
    values: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    values |= {name: tuple(getattr(message, name)) for name in _LISTS}
    values["logit_bias"] = tuple((entry.token_id, entry.bias) for entry in message.logit_bias)
    if message.HasField("structured_output"):
        values["structured_output"] = _structured_output_from_proto(message.structured_output)
    return with_defaults(values, defaults or {})


def _structured_output_to_proto(wanted: StructuredOutput) -> baton_pb2.StructuredOutput:
    form: Any = wanted.text
    if wanted.kind is GrammarKind.CHOICE:
        form = baton_pb2.Choice(texts=wanted.choices)
    elif wanted.kind is GrammarKind.JSON_OBJECT:
        form = True
    return baton_pb2.StructuredOutput(**{wanted.kind.value: form}, disable_any_whitespace=wanted.disable_any_whitespace)


def _structured_output_from_proto(message: baton_pb2.StructuredOutput) -> StructuredOutput:
    form = message.WhichOneof("form")
    if form is None or (form == "json_object" and not message.json_object):
        names = ", ".join(kind.value for kind in GrammarKind)
        raise InvalidRequestError(f"structured_output has no form: set one of {names}")
    return StructuredOutput(
        GrammarKind(form),
        getattr(message, form) if isinstance(getattr(message, form), str) else "",
        tuple(message.choice.texts) if form == "choice" else (),
        message.disable_any_whitespace,
    )
