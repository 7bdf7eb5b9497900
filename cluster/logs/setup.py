"""Where a process logs."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from cluster.logs.formats import formatter

_FILE_BYTES, _OLD_FILES = 16 * 2**20, 3
REQUESTS = "baton.requests"
"""Logger of the line that each request has at its end."""


def log_to_stderr(level: str, form: str, process: str) -> None:
    """Log to the error stream, in place of what was set up before.

    Args:
        level: the lowest that is written: debug, info, warning or error.
        form: text or json.
        process: what lines call it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form, process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def log_to_file(level: str, form: str, process: str, folder: Path) -> Path | None:
    """Log to `<folder>/<process>.log` besides, which starts anew when it is large; three older ones are kept.

    Returns:
        The file; None: it cannot be written, which is logged.
    """
    path = folder / f"{process}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8")
    except OSError as error:
        logging.getLogger(__name__).warning("%s logs to no file: cannot write %s: %s", process, path, error.strerror)
        return None
    handler.setFormatter(formatter(form, process))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return path
