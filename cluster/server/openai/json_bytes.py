"""JSON as it goes over the wire."""

from __future__ import annotations

import json
from typing import Any

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def json_bytes(value: Any) -> bytes:
    """UTF-8; what a client has sent and is no Unicode (a lone surrogate) comes back as a question mark."""
    return _encode(value).encode("utf-8", "replace")
