"""A record of a log as a line of text, or as a line of JSON with all of its fields."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

TEXT = "%(asctime)s %(levelname)s {process} %(name)s: %(message)s"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest was given by who logged."""


class TextFormatter(logging.Formatter):
    """One line: time, level, process, logger, message.

    Args:
        process: who logs, such as "gateway" or "prefill-0".
    """

    def __init__(self, process: str) -> None:
        super().__init__(TEXT.format(process=process.replace("%", "%%")))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, logger, message, and what `extra` brought.

    Args:
        process: who logs, such as "gateway" or "prefill-0".
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds, fraction = divmod(record.created, 1.0)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(fraction * 1e6):06d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def formatter(name: str, process: str) -> logging.Formatter:
    """The one of this name, "text" or "json", for a process."""
    return JsonFormatter(process) if name == "json" else TextFormatter(process)
