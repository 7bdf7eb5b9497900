"""What a checkpoint's makers want tokens to be chosen with, where a request says nothing: generation_config.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError, InvalidRequestError
from workers.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""The keys that are looked at, and the parameters that they are: those that vLLM takes."""


def read_sampling_defaults(folder: Path) -> dict[str, Any]:
    """The values of `SamplingParams` that a checkpoint's generation_config.json names; none where it has no such file.

    `do_sample: false` says nothing here, as in vLLM; a value that no request could have either is left out, and logged.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        given = {name: content[key] for key, name in _NAMES.items() if content.get(key) is not None}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    return {name: value for name, value in given.items() if _is_good(path, name, value)}


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request: what it gives, else the defaults, whose `max_tokens` gives way to its `min_tokens`.

    Raises:
        InvalidRequestError: a value out of range.
    """
    values = {**defaults, **given}
    if "max_tokens" not in given and values.get("max_tokens", 0) < given.get("min_tokens", 0):
        values.pop("max_tokens", None)
    return SamplingParams(**values)


def _is_good(path: Path, name: str, value: object) -> bool:
    kinds = (int,) if name in ("top_k", "max_tokens") else (int, float)
    reason = "" if isinstance(value, kinds) and not isinstance(value, bool) else "it is no number"
    if not reason:
        try:
            with_defaults({name: value}, {})
        except InvalidRequestError as error:
            reason = str(error)
    if reason:
        logger.warning("%s: %s is %r, which is left out: %s", path, name, value, reason)
    return not reason
