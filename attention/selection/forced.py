"""What code forces for as long as a `with` block runs: for the whole process, whichever thread looks.

Workers load models on threads of their own, which a value of the forcing thread alone would not reach.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Forced(Generic[T]):
    """Values that are in force, in the order in which their blocks were entered.

    Blocks nest, and those of different threads may overlap in any way: each takes back its own value when it ends, and
    no other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[tuple[object, T]] = []

    @contextmanager
    def force(self, value: T) -> Iterator[None]:
        """Have `value` in force in this block, after all that are already."""
        block = object()
        with self._lock:
            self._entries.append((block, value))
        try:
            yield
        finally:
            with self._lock:
                self._entries = [entry for entry in self._entries if entry[0] is not block]

    def values(self) -> list[T]:
        """All that are in force, the one that was entered last at the end."""
        with self._lock:
            return [value for _, value in self._entries]
