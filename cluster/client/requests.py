"""What a client sends: requests put on the wire."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypedDict, Unpack, cast

from cluster.client.conversations import ConversationOptions, Messages, chat_to_proto
from cluster.wire.sampling import sampling_to_proto
from protos import baton_pb2
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput

_SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {"bad_words_token_ids"}

_CONVERSATION = frozenset(ConversationOptions.__annotations__)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`, with its meanings; None is as if a field were not given."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    max_tokens: int | None
    min_tokens: int | None
    logprobs: int | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    structured_output: StructuredOutput | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    n: int | None
    prompt_logprobs: int | None


class RequestOptions(TypedDict, total=False):
    """What a client may say of a request as a whole, by the wire's names.

    Attributes:
        model: that it expects; another one than is served is refused.
        request_id: its name for the request, for logs; the server makes one up.
        priority: where requests wait for room, lower ones go first; 0 is the default.
        user: whose request it is: users of one priority take turns.
    """

    model: str
    request_id: str
    priority: int
    user: str


class Options(SamplingOptions, RequestOptions, ConversationOptions, total=False):
    """What a client may say of a request beside its prompt."""


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    chat: Messages | None,
    sampling: SamplingParams | None,
    **options: Unpack[Options],
) -> baton_pb2.GenerateRequest:
    """The message for `BatonClient.generate`'s arguments.

    Raises:
        InvalidRequestError: not exactly one form of prompt, an option that there is not, or a value that cannot be put
            on the wire.
    """
    if sum(form is not None for form in (prompt, token_ids, chat)) != 1:
        raise InvalidRequestError("give exactly one of prompt, token_ids and chat")
    given: dict[str, Any] = dict(options)
    of_chat = _of_chat(given, chat)
    of_sampling = {name: value for name, value in given.items() if name in _SAMPLING and value is not None}
    of_request = {name: value for name, value in given.items() if name not in _SAMPLING and name not in _CONVERSATION}
    for name in of_request:
        if name not in RequestOptions.__annotations__:
            raise InvalidRequestError(_unknown(name))
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InvalidRequestError(f"sampling is {sampling!r}, expected SamplingParams")
    if isinstance(of_sampling.get("logit_bias"), Mapping):
        of_sampling["logit_bias"] = tuple(of_sampling["logit_bias"].items())
    if of_sampling:
        sampling = replace(sampling or SamplingParams(), **of_sampling)
    try:
        return baton_pb2.GenerateRequest(
            text=_text(prompt),
            token_ids=None if token_ids is None else baton_pb2.TokenIds(ids=_ids(token_ids)),
            chat=None if chat is None else chat_to_proto(chat, of_chat),
            sampling=None if sampling is None else sampling_to_proto(sampling),
            **of_request,
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error


def tokenize_request(
    prompt: str | None, chat: Messages | None, **options: Unpack[ConversationOptions]
) -> baton_pb2.TokenizeRequest:
    """The message for `BatonClient.tokenize`'s arguments. Errors as in `generate_request`."""
    if (prompt is None) == (chat is None):
        raise InvalidRequestError("give exactly one of prompt and chat")
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in _CONVERSATION:
            raise InvalidRequestError(_unknown(name))
    of_chat = _of_chat(given, chat)
    try:
        return baton_pb2.TokenizeRequest(
            text=_text(prompt), chat=None if chat is None else chat_to_proto(chat, of_chat)
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error


def scale_request(targets: Mapping[str, int]) -> baton_pb2.ScaleRequest:
    """The message for `BatonClient.scale`'s targets. Errors as in `generate_request`."""
    try:
        return baton_pb2.ScaleRequest(targets=dict(targets))
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error


def _of_chat(given: Mapping[str, Any], chat: Messages | None) -> ConversationOptions:
    """Of these options, those of a conversation, which there must be."""
    found = {name: value for name, value in given.items() if name in _CONVERSATION and value is not None}
    if found and chat is None:
        raise InvalidRequestError(f"{next(iter(found))} is given without chat: it belongs to a conversation")
    return cast("ConversationOptions", found)


def _text(prompt: object) -> str | None:
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidRequestError(f"prompt is {_shown(prompt)}, expected text")
    return prompt


def _ids(token_ids: Any) -> Any:
    if isinstance(token_ids, str | bytes | Mapping):
        raise InvalidRequestError(f"token_ids is {_shown(token_ids)}, expected a list of integers")
    return token_ids


def _unknown(name: str) -> str:
    names = [*Options.__annotations__]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(names))}"
    return f"there is no option {name!r}; {hint}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
