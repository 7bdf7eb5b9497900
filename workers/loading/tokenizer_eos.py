"""The token that a checkpoint's tokenizer calls the end of a text, read from its files without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError
from workers.loading.config_reader import read_json

_NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json")


def tokenizer_eos_token_id(folder: Path) -> int | None:
    """The id of the tokenizer's end-of-sequence token; None: it names none, or has no such token.

    Raises:
        CheckpointError: a file cannot be read, or is not what it should be; names it.
    """
    configs = [read_json(folder / name) for name in _NAMED_IN if (folder / name).is_file()]
    spelled = next((token for config in configs if (token := _spelled(config.get("eos_token"))) is not None), None)
    if spelled is None:
        return None
    for config in configs:
        for token_id, token in _mapping(config.get("added_tokens_decoder")).items():
            if _spelled(token) == spelled and str(token_id).isdecimal():
                return int(token_id)
    path = folder / "tokenizer.json"
    return _id_in(path, spelled) if path.is_file() else None


def _id_in(path: Path, spelled: str) -> int | None:
    """The id of a token in a tokenizer.json."""
    content = read_json(path)
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: added_tokens must be objects with content and id") from error
    found = added.get(spelled, _mapping(_mapping(content.get("model")).get("vocab")).get(spelled))
    return found if isinstance(found, int) else None


def _spelled(token: Any) -> str | None:
    """A token as text, given so or as an object with its content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
