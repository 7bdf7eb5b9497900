"""The form of an answer, as OpenAI's clients ask for it, and vLLM's by its new and its old names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.model import FirstError, RequestModel
from workers.errors import InvalidRequestError
from workers.structured_output import StructuredOutput


class FormFields(RequestModel):
    """The fields that say which form an answer has; at most one may."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], FirstError()] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None

    def forms(self) -> dict[str, StructuredOutput]:
        """The forms that are asked for, by field.

        Raises:
            InvalidRequestError: one is wrong.
        """
        found: dict[str, StructuredOutput | None] = {
            "response_format": _response_format(self.response_format or {}, "response_format"),
            "structured_outputs": _structured_outputs(self.structured_outputs or {}),
        }
        for name, make in _FORMS.items():
            value = getattr(self, f"guided_{name}")
            found[f"guided_{name}"] = None if value in (None, False) else make(value, False)
        return {name: form for name, form in found.items() if form is not None}

    def structured_output(self) -> StructuredOutput | None:
        """The form of the answer; None: any.

        Raises:
            InvalidRequestError: it is wrong, or there are several.
        """
        forms = self.forms()
        if len(forms) > 1:
            raise InvalidRequestError(f"{' and '.join(forms)} are given: an answer has one form")
        return next(iter(forms.values()), None)


def text_format(text: Mapping[str, Any]) -> StructuredOutput | None:
    """The form in the `text` of a request to /v1/responses, which has its schema in the format itself.

    Raises:
        InvalidRequestError: it is wrong.
    """
    given = _object(text.get("format") or {}, "text.format")
    nested = {"type": given.get("type", "text"), "json_schema": given}
    return _response_format(nested, "text.format")


def _response_format(given: Mapping[str, Any], field: str) -> StructuredOutput | None:
    kind = given.get("type", "text") if given else "text"
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput.json_object()
    if kind == "json_schema":
        described = _object(given.get("json_schema"), f"{field}.json_schema")
        schema = described.get("schema")
        if not isinstance(schema, dict | bool):
            raise InvalidRequestError(f"{field} is of type 'json_schema' and has no schema")
        return StructuredOutput.json_schema(schema)
    raise UnsupportedFieldError(
        field.partition(".")[0], f"{field} is of type {kind!r}; text, json_object and json_schema are supported"
    )


def _structured_outputs(given: Mapping[str, Any]) -> StructuredOutput | None:
    field = "structured_outputs"
    known = {*_FORMS, "disable_any_whitespace", "disable_fallback", "backend"}
    for name, value in given.items():
        if name not in known and value not in (None, False):
            raise UnsupportedFieldError(field, f"{field}.{name} is not supported by this server")
    forms = [name for name in _FORMS if given.get(name) not in (None, False)]
    if len(forms) > 1:
        raise InvalidRequestError(f"{field} has {' and '.join(forms)}: an answer has one form")
    return _FORMS[forms[0]](given[forms[0]], bool(given.get("disable_any_whitespace"))) if forms else None


def _object(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} must be an object")
    return value


def _json(value: Any, disable_any_whitespace: bool) -> StructuredOutput:
    if not isinstance(value, str | dict | bool):
        raise InvalidRequestError("a JSON schema must be an object, or a text that is one")
    return StructuredOutput.json_schema(value, disable_any_whitespace=disable_any_whitespace)


def _text(make: Callable[[str], StructuredOutput]) -> Callable[[Any, bool], StructuredOutput]:
    def made(value: Any, _: bool) -> StructuredOutput:
        if not isinstance(value, str):
            raise InvalidRequestError("a regex or grammar must be a text")
        return make(value)

    return made


def _choice(value: Any, _: bool) -> StructuredOutput:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InvalidRequestError("choice must be a list of texts")
    return StructuredOutput.choice(value)


_FORMS: dict[str, Callable[[Any, bool], StructuredOutput]] = {
    "json": _json,
    "regex": _text(StructuredOutput.regex),
    "choice": _choice,
    "grammar": _text(StructuredOutput.grammar),
    "json_object": lambda _, disable: StructuredOutput.json_object(disable_any_whitespace=disable),
}
"""vLLM's names: fields of `structured_outputs`, and of a request behind `guided_`."""
