"""How a group of workers is called where pools are scaled: by its pool, and by its name if it has one."""

from __future__ import annotations


def group_key(role: str, group: str) -> str:
    """What a pool, or a named group of it, is scaled by: decode, or decode.h100."""
    return f"{role}.{group}" if group else role
