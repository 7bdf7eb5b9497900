"""The three forms of a prompt on the wire."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format  # type: ignore[import-untyped]

from cluster.generation.conversations import Conversation
from cluster.generation.prompt_encoder import Prompt
from cluster.wire.chat import messages_from_proto, tool_use_from_proto
from protos import baton_pb2
from workers.errors import InvalidRequestError
from workers.token_ids import as_token_ids


def prompt_from_proto(request: baton_pb2.GenerateRequest | baton_pb2.TokenizeRequest) -> Prompt:
    """The prompt that a request carries.

    Raises:
        InvalidRequestError: it carries none, an id that cannot be one, or a call or tool that is wrong.
    """
    form = request.WhichOneof("input")
    if form == "text":
        return str(request.text)
    if form == "chat":
        return Conversation(
            messages_from_proto(request.chat.messages),
            _variables(request.chat),
            tool_use=tool_use_from_proto(request.chat),
        )
    if form == "token_ids" and isinstance(request, baton_pb2.GenerateRequest):
        return as_token_ids(request.token_ids.ids)
    forms = [field.name for field in request.DESCRIPTOR.oneofs_by_name["input"].fields]
    raise InvalidRequestError(f"the request has no prompt: set one of {', '.join(forms)}")


def _variables(chat: baton_pb2.ChatMessages) -> Any:
    try:
        return _whole(json_format.MessageToDict(chat.chat_template_kwargs))
    except (ValueError, RecursionError) as error:  # numbers that are not finite
        raise InvalidRequestError(f"chat_template_kwargs is no JSON object: {error}") from error


def add_special_tokens_from_proto(request: baton_pb2.GenerateRequest | baton_pb2.TokenizeRequest) -> bool | None:
    """What a request says of special tokens; None: nothing."""
    return request.add_special_tokens if request.HasField("add_special_tokens") else None


def _whole(value: Any) -> Any:
    """A value of a Struct, whose numbers are all floats, with whole ones as integers: templates write them out."""
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
