"""From what a request asks for to a grammar as llguidance reads it; nothing is compiled here."""

from __future__ import annotations

import json

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from workers.errors import InvalidRequestError
from workers.structured_output import GrammarKind, StructuredOutput

_WHITESPACE = r"[ \n\r\t]{1,32}"
"""Between two tokens of JSON. Bounded: a model that is lost in whitespace comes out of it."""


def source_of(wanted: StructuredOutput) -> str:
    """The grammar of a form.

    Raises:
        InvalidRequestError: it cannot be read.
    """
    try:
        match wanted.kind:
            case GrammarKind.JSON_SCHEMA:
                return _json(wanted.text, wanted.disable_any_whitespace)
            case GrammarKind.JSON_OBJECT:
                return _json('{"type": "object"}', wanted.disable_any_whitespace)
            case GrammarKind.REGEX:
                return LLMatcher.grammar_from_regex(wanted.text)
            case GrammarKind.CHOICE:
                texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(wanted.choices))
                return LLMatcher.grammar_from_lark(f"start: {texts}")
            case GrammarKind.GRAMMAR:
                return LLMatcher.grammar_from_lark(any_to_lark(wanted.text))
    except InvalidRequestError:
        raise
    except Exception as error:  # the readers of EBNF raise what they like, RecursionError among others
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidRequestError(f"structured_output.{wanted.kind.value} cannot be read: {reason:.300}") from error


def _json(schema: str, disable_any_whitespace: bool) -> str:
    if schema.strip() in ("true", "false"):  # schemas, too, but not to the library
        schema = "{}" if schema.strip() == "true" else '{"not": {}}'
    if disable_any_whitespace:
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
    return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _WHITESPACE})
