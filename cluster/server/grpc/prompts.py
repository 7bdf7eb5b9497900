"""The three forms of a prompt on the wire."""

from __future__ import annotations

from cluster.gateway.text_generation import Conversation, Prompt
from cluster.text.tokenizer import ChatMessage
from protos import baton_pb2
from workers.errors import InvalidRequestError
from workers.token_ids import as_token_ids


def prompt_from_proto(request: baton_pb2.GenerateRequest | baton_pb2.TokenizeRequest) -> Prompt:
    """The prompt that a request carries.

    Raises:
        InvalidRequestError: it carries none, or an id that cannot be one.
    """
    form = request.WhichOneof("input")
    if form == "text":
        return str(request.text)
    if form == "chat":
        return Conversation(tuple(ChatMessage(m.role, m.content) for m in request.chat.messages))
    if form == "token_ids" and isinstance(request, baton_pb2.GenerateRequest):
        return as_token_ids(request.token_ids.ids)
    forms = [field.name for field in request.DESCRIPTOR.oneofs_by_name["input"].fields]
    raise InvalidRequestError(f"the request has no prompt: set one of {', '.join(forms)}")
