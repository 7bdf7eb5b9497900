"""Pieces of the generated pages: tables, the results that they show, and where those came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.errors import ConfigError


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """A Markdown table; the columns after the first `num_text_columns` hold numbers and are set to the right."""
    rule = ["---" if column < num_text_columns else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def provenance(environment: Mapping[str, Any]) -> str:
    """One line: where, when and with what a result was measured."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    dirty = " with changes" if environment["dirty"] else ""
    threads = "" if environment["threads"] is None else f", {environment['threads']} thread(s)"
    return (
        f"`{environment['command']}`, {environment['date']}, commit {environment['commit'][:12]}{dirty}; "
        f"{environment['cpu']}, {environment['cores']} cores{threads}; Python {environment['python']}, {packages}."
    )


def read_result(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ConfigError: it cannot be read, or is no JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return content
