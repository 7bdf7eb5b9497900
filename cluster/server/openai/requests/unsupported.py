"""The fields that this server does not honour, in one place, and what becomes of those that nobody knows.

A field of the table is refused by its name, unless its value asks for nothing. What is in no table is ignored, as
OpenAI and vLLM do, and logged once. To support a field, take it from here and give it to the request's model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from cluster.request_id import clean_request_id
from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.model import RequestModel
from workers.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_ONE_OF_NOTHING: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
}
"""Values that ask for nothing, beside null, false and what is empty."""
_CHOOSING = (
    "prompt_logprobs",
    "use_beam_search",
    "length_penalty",
    "logits_processors",
    "truncate_prompt_tokens",
    "spaces_between_special_tokens",
    "thinking_token_budget",
)
_STRUCTURED = ("structural_tag", "guided_whitespace_pattern")
_TOOLS = ("tools", "tool_choice", "functions", "function_call", "max_tool_calls")
_OTHER_FORMS = (
    "suffix",
    "prompt_embeds",
    "documents",
    "chat_template",
    "modalities",
    "audio",
    "prediction",
    "web_search_options",
    "mm_processor_kwargs",
)
_KEPT = ("previous_response_id", "conversation", "background", "truncation", "prompt")
"""What a server would have to keep from one request to the next."""
_WORKERS = ("kv_transfer_params", "vllm_xargs")
UNSUPPORTED = frozenset(_CHOOSING + _STRUCTURED + _TOOLS + _OTHER_FORMS + _KEPT + _WORKERS)
IGNORED = frozenset(
    {
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "verbosity",
        "include_reasoning",
        "reasoning",
        "include",
        "guided_decoding_backend",
        "stream_options",
        "request_id",
        "moderation",
    }
)
"""Fields that change nothing of an answer here."""
_warned: set[str] = set()
_MOST_WARNINGS = 1000
MAX_EXTRA_FIELDS = 256


def check_fields(body: RequestModel) -> None:
    """Refuse what cannot be honoured; say once of each field that nobody knows that it is ignored.

    Raises:
        UnsupportedFieldError: a field, or a value of one, is not supported.
        InvalidRequestError: there are too many that nobody knows.
    """
    extra = body.model_extra or {}
    if len(extra) > MAX_EXTRA_FIELDS:
        raise InvalidRequestError(
            f"the request has {len(extra)} fields that are not known, at most {MAX_EXTRA_FIELDS} are ignored"
        )
    for name, value in extra.items():
        if name in UNSUPPORTED:
            if _asks(value) and value not in _ONE_OF_NOTHING.get(name, ()):
                raise UnsupportedFieldError(name, f"{name} is not supported by this server")
        elif name not in IGNORED and len(_warned) < _MOST_WARNINGS:
            _warn_once(clean_request_id(name))


def check_best_of(best_of: int | None, n: int) -> None:
    """Answers that are generated only to be thrown away are not supported.

    Raises:
        UnsupportedFieldError: there would be any.
    """
    if best_of not in (None, n):
        raise UnsupportedFieldError("best_of", f"best_of is {best_of}, which is not supported: leave it out, and use n")


def supported_value(extra: Mapping[str, Any] | None, name: str, what: str) -> None:
    """Refuse an extra field of a part of a request.

    Raises:
        UnsupportedFieldError: it is there, and asks for something.
    """
    if extra and _asks(extra.get(name)):
        raise UnsupportedFieldError(name, f"{what} with {name} are not supported by this server")


def _asks(value: object) -> bool:
    """Whether a field's value asks for something; 0 does."""
    return value is not None and value is not False and not (isinstance(value, str | list | dict) and not value)


def _warn_once(name: str) -> None:
    if name not in _warned:
        _warned.add(name)
        logger.warning("requests have a field %r, which is ignored", name)
