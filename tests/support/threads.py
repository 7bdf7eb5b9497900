"""Threads, by the names that the product gives them."""

from __future__ import annotations

import threading


def wait_for_the_end(name: str, timeout_s: float) -> None:
    """Until no thread of this name is left."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(timeout_s)
            assert not thread.is_alive(), f"{name} goes on"
