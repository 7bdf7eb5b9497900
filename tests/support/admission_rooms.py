"""What an admission queue gives out in tests: a number of places, and who took one in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Rooms:
    """Something with a number of places."""

    def __init__(self, free: int = 0) -> None:
        self.free = free
        self.order: list[str] = []

    def attempt(self, name: str, size: int = 1) -> Callable[[], str | None]:
        """What tries to take so many for somebody."""

        def take() -> str | None:
            if self.free < size:
                return None
            self.free -= size
            self.order.append(name)
            return name

        return take


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)
