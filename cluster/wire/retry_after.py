"""How a refused call is told when to come again."""

from __future__ import annotations

RETRY_AFTER_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of a refused call: gRPC clients that retry by themselves wait so many milliseconds."""
