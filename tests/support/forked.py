"""Processes of the tests' own that begin with everything imported that takes long to import.

They are forked from one process that has imported it once and does nothing else: nothing of the test process is shared.
"""

from __future__ import annotations

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["torch", "workers.models.loader", "workers.parallel.group", "kv_transfer.nixl_connector"]
)
