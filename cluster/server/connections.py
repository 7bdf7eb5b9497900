"""How many connections the doors take: as many as leave the process files for everything else that it does."""

from __future__ import annotations

import contextlib

IDLE_S = 300
"""A gRPC connection without a call is closed after so long; clients connect again by themselves."""
HEAD_LIMIT_S = 60
"""For the head of an HTTP request to be there, from the first byte or from the connection on."""
BODY_LIMIT_S = 60
"""For the body to be there, from the head on."""
_SHARE_OF_FILES = 0.3
_MOST_FILES = 65_536
_USUAL_FILES = 1024


def raise_file_limit() -> int:
    """Let this process have as many open files as it may have at all, and return how many that is."""
    try:
        import resource
    except ImportError:
        return _USUAL_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, _MOST_FILES)


def connections_of(num_files: int) -> tuple[int, int]:
    """For one door: how many in all, a share of the files, and of one host, half of that."""
    most = max(2, int(num_files * _SHARE_OF_FILES))
    return most, max(1, most // 2)
