"""What all requests have in common: how strictly they are read, and types of fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field


class FirstError(FailFast):
    """Of a list: the first wrong element is reported, and not each of a million, which would take much memory."""

    __hash__ = object.__hash__  # without one an annotated type cannot be part of a union


Texts = Annotated[list[str], FirstError()]
TokenIdList = Annotated[list[int], FirstError()]


class RequestModel(BaseModel):
    """A JSON object of a request: no text stands for a number, `null` is as if the field were not there.

    Fields that are not known are kept in `model_extra`; see `unsupported`.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), arbitrary_types_allowed=True)

    def given(self, *names: str) -> dict[str, Any]:
        """Of these fields, those that are there."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopTexts = Annotated[Texts, BeforeValidator(_one_or_more), Field(max_length=1024)]
"""One text, or a list of them."""


def _whole_prompt(value: Any) -> Any:
    """A prompt, or several: always a list, of texts or of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(part) is int for part in value):
            return [value]
        if all(isinstance(part, str) for part in value):
            return value
        if all(isinstance(part, list) and all(type(token) is int for token in part) for part in value):
            return value
    raise ValueError("it must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")


def _valid_unicode(value: list[Any]) -> list[Any]:
    for part in value:
        if isinstance(part, str):
            part.encode()  # UnicodeEncodeError is a ValueError
    return value


Prompts = Annotated[Any, BeforeValidator(_whole_prompt), AfterValidator(_valid_unicode)]
