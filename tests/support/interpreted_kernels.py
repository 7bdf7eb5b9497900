"""Triton's interpreter without work that it repeats, and without some that nobody looks at: more than half of its time.

Calling a device function replaces `triton.language`'s builtins by interpreted ones, found by a look at every member of
its modules. For all calls but the first of a launch they are replaced already. Every operation makes a table of all
numpy's dtypes to look one up. And integers are added and multiplied in 64 bits too, to find out whether 32 were enough,
which is asserted in Triton's debug mode alone.
"""

from __future__ import annotations

import dataclasses
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


class NumpyDtypes:
    """`_get_np_dtype` that looks a number's dtype up once; pointers and blocks are left to the original.

    Args:
        look_up: Triton's own; takes a dtype of Triton's and returns numpy's.
        plain: the class of the dtypes of numbers.
    """

    def __init__(self, look_up: Callable[[Any], Any], plain: type) -> None:
        self._look_up = look_up
        self._plain = plain
        self._known: dict[str, Any] = {}

    def __call__(self, dtype: Any) -> Any:
        """Numpy's dtype of one of Triton's."""
        if type(dtype) is not self._plain:
            return self._look_up(dtype)
        if dtype.name not in self._known:
            self._known[dtype.name] = self._look_up(dtype)
        return self._known[dtype.name]


def hasten() -> None:
    """For all kernels of this process; nothing happens where Triton is absent or its interpreter is another."""
    try:
        from triton import language
        from triton.runtime import interpreter

        patch, dtype_of, builder = interpreter._patch_lang, interpreter._get_np_dtype, interpreter.interpreter_builder
    except (ImportError, AttributeError):
        return
    if not isinstance(patch, OncePerLaunch):
        interpreter._patch_lang = OncePerLaunch(patch, (language, language.core))
        interpreter._get_np_dtype = NumpyDtypes(dtype_of, language.dtype)
        if not builder.options.debug:
            builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
