"""Triton's interpreter without work that it repeats: nearly half of its time.

Calling a device function replaces `triton.language`'s builtins by interpreted ones, found by a look at every member of
its modules. For all calls but the first of a launch they are replaced already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OncePerLaunch:
    """`_patch_lang` that does nothing for modules which this launch has patched before.

    A launch undoes its own patches at its end, those of the functions that it calls stay.

    Args:
        patch: Triton's own; takes a function and returns what undoes it.
        modules: those of `triton.language` that it looks for among a function's globals.
    """

    def __init__(self, patch: Callable[[Any], Any], modules: tuple[Any, ...]) -> None:
        self._patch = patch
        self._modules = modules
        self._seen_by: dict[Any, frozenset[int]] = {}
        self._patched: set[int] = set()

    def __call__(self, fn: Any) -> Any:
        """The scope that undoes it; None where there is nothing to do, which only nested calls get."""
        if fn not in self._seen_by:
            values = {id(value) for value in fn.__globals__.values()}
            self._seen_by[fn] = frozenset(id(module) for module in self._modules if id(module) in values)
        seen = self._seen_by[fn]
        if seen and seen <= self._patched:
            return None
        scope = self._patch(fn)
        self._patched |= seen
        return _Scope(scope, self._patched)


class _Scope:
    """A launch's, whose end is the end of all that was patched."""

    def __init__(self, scope: Any, patched: set[int]) -> None:
        self._scope = scope
        self._patched = patched

    def restore(self) -> None:
        self._scope.restore()
        self._patched.clear()


def patch_once_per_launch() -> None:
    """For all kernels of this process; nothing happens where Triton is absent or its interpreter is another."""
    try:
        from triton import language
        from triton.runtime import interpreter

        patch = interpreter._patch_lang
    except (ImportError, AttributeError):
        return
    if not isinstance(patch, OncePerLaunch):
        interpreter._patch_lang = OncePerLaunch(patch, (language, language.core))
