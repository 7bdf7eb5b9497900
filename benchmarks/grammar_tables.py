"""The tables of docs/structured-output.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import table


def grammar_libraries(result: Mapping[str, Any]) -> str:
    """The libraries side by side: schemas with answers, then forms that take long to compile."""
    libraries = result["libraries"]
    rows = [("answers that are valid", *(f"{m['valid']} of {m['schemas']}" for m in libraries.values()))]
    for name, label in (("compile_s", "compile a schema"), ("mask_s", "mask of a token")):
        for key in ("mean", "median", "p99", "max"):
            rows.append((f"{label}, {key}, ms of a core", *(f"{m[name][key] * 1e3:.3f}" for m in libraries.values())))
    cases = next(iter(libraries.values()))["hard"]
    rows += [(case, *(m["hard"][case].replace("|", "\\|") for m in libraries.values())) for case in cases]
    return table(("", *libraries), rows, num_text_columns=1)


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"grammar_libraries": grammar_libraries}
