"""What a server spends on streams that are all under way, by two processes that answer by lines."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.line_process import LineProcess

_WARM_UP_S = 2.0
_PATIENCE_S = 120.0
_COUNTS = ("tokens", "messages", "failures")


def spent_on_streams(server: LineProcess, client: LineProcess, streams: int, seconds: float) -> dict[str, Any]:
    """Processor seconds of the server, and what the client has received meanwhile.

    Args:
        server: answers with `cpu_s`, its processor seconds so far.
        client: answers with `begun`, its streams that have a token, and with its `tokens`, `messages` and `failures`.
        streams: that are to have begun before anything is measured.
        seconds: to measure for.

    Raises:
        RuntimeError: the streams do not begin, or a process has ended.
    """
    patience_ends = time.monotonic() + _PATIENCE_S
    while client.ask()["begun"] < streams:
        if time.monotonic() > patience_ends:
            raise RuntimeError(f"not all of {streams} streams have begun after {_PATIENCE_S:g} s")
        time.sleep(0.1)
    time.sleep(_WARM_UP_S)
    cpu, before = server.ask()["cpu_s"], client.ask()
    time.sleep(seconds)
    cpu, after = server.ask()["cpu_s"] - cpu, client.ask()
    return {"cpu_s": cpu, **{name: after[name] - before[name] for name in _COUNTS}}
