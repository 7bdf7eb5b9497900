"""The form that a request wants its answer to have: a JSON schema, any JSON object, a regex, a grammar, a choice."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.errors import InvalidRequestError

MAX_BYTES = 256 * 1024
"""Of a schema, regex or grammar, and of all choices together, as UTF-8."""
MAX_GRAMMAR_BYTES = 64 * 1024
"""Of a grammar, which is read more slowly."""
MAX_CHOICES = 10_000


class GrammarKind(enum.Enum):
    """What the form is written in."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"


@dataclass(frozen=True)
class StructuredOutput:
    """What an answer must match, from its first token to its end. The class methods make one.

    That it is a form at all is found out where it is compiled, see `workers.grammars`; here are its limits.

    Attributes:
        kind: what it is written in.
        text: the schema as JSON, the regex, or the grammar (EBNF as llama.cpp, xgrammar and vLLM write it, or Lark).
        choices: the texts to choose from.
        disable_any_whitespace: of JSON, leave no choice where there is whitespace.

    Raises:
        InvalidRequestError: it is empty or too long.
    """

    kind: GrammarKind
    text: str = ""
    choices: tuple[str, ...] = ()
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        name = f"structured_output.{self.kind.value}"
        if self.kind is GrammarKind.CHOICE:
            if not self.choices or not all(self.choices):
                raise InvalidRequestError(f"{name} needs at least one text, and none may be empty")
            if len(self.choices) > MAX_CHOICES:
                raise InvalidRequestError(f"{name} has {len(self.choices)} texts, at most {MAX_CHOICES} are allowed")
        elif self.kind is not GrammarKind.JSON_OBJECT and not self.text:
            raise InvalidRequestError(f"{name} is empty")
        limit = MAX_GRAMMAR_BYTES if self.kind is GrammarKind.GRAMMAR else MAX_BYTES
        if (size := self.num_bytes) > limit:
            raise InvalidRequestError(f"{name} has {size} bytes, at most {limit} are allowed")

    @property
    def num_bytes(self) -> int:
        """The size of it all as UTF-8."""
        return sum(len(text.encode(errors="surrogatepass")) for text in (self.text, *self.choices))

    @classmethod
    def json_schema(
        cls, schema: str | bool | Mapping[str, Any], *, disable_any_whitespace: bool = False
    ) -> StructuredOutput:
        """JSON that a schema allows; it is given as JSON text or as what that text stands for.

        Raises:
            InvalidRequestError: it is too long, or cannot be written as JSON.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"structured_output.json_schema is not JSON: {error}") from error
        return cls(GrammarKind.JSON_SCHEMA, text, disable_any_whitespace=disable_any_whitespace)

    @classmethod
    def json_object(cls, *, disable_any_whitespace: bool = False) -> StructuredOutput:
        """Any JSON object."""
        return cls(GrammarKind.JSON_OBJECT, disable_any_whitespace=disable_any_whitespace)

    @classmethod
    def regex(cls, regex: str) -> StructuredOutput:
        """A text that all of a regular expression matches; see `InvalidRequestError` above."""
        return cls(GrammarKind.REGEX, regex)

    @classmethod
    def grammar(cls, grammar: str) -> StructuredOutput:
        """A text of a context-free grammar; see `InvalidRequestError` above."""
        return cls(GrammarKind.GRAMMAR, grammar)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> StructuredOutput:
        """One of several texts; see `InvalidRequestError` above."""
        return cls(GrammarKind.CHOICE, choices=tuple(choices))
