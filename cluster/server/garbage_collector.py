"""Python's garbage collector in a process that serves."""

from __future__ import annotations

import gc

THRESHOLDS = (50_000, 20, 50)
"""Allocations before the youngest generation is looked at, and looks before the next older one is: a request's objects
are freed by their counts, and what is left to the collector are cycles, which errors make."""


def settle() -> None:
    """Once everything is loaded: have the collector leave alone what is there, and look less often at what comes.

    With the thresholds that Python begins with, it takes a quarter of the processor at two thousand streams, and stands
    still for a quarter of a second to look at modules and models that never go.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
