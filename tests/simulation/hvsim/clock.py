"""The clocks of one machine: they drift, and its wall clock jumps."""

import asyncio
from datetime import UTC, datetime, timedelta

__all__ = ["SimClock"]

_START = datetime(2030, 1, 1, tzinfo=UTC)


class SimClock:
    """Implements ``Clock`` on the loop's time. ``rate``: seconds it counts in a true one; ``offset_s`` of its wall
    clock."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, rate: float = 1.0, offset_s: float = 0.0, base: float = 0.0
    ) -> None:
        self._loop = loop
        self._rate = rate
        self._offset_s = offset_s
        self._base = base

    def now(self) -> datetime:
        return _START + timedelta(seconds=self._loop.time() * self._rate + self._offset_s)

    def monotonic(self) -> float:
        return self._base + self._loop.time() * self._rate

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._rate)

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._offset_s += seconds
