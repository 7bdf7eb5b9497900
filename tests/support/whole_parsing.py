"""`ast.parse` without a garbage collection amid it.

CPython 3.11 counts the depth of a tree in state that all parses share. A collection that runs Python code which parses,
too, leaves the count wrong: "AST constructor recursion depth mismatch", a SystemError.
"""

from __future__ import annotations

import ast
import functools
import gc
from typing import Any


def parse_whole() -> None:
    """Replace `ast.parse` in this process."""
    parse: Any = ast.parse
    if hasattr(parse, "__wrapped__"):
        return

    @functools.wraps(parse)
    def whole(*args: Any, **kwargs: Any) -> Any:
        collects = gc.isenabled()
        gc.disable()
        try:
            return parse(*args, **kwargs)
        finally:
            if collects:
                gc.enable()

    ast.parse = whole
