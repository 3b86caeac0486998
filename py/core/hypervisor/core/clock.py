"""Time as a parameter: components take a :class:`Clock`, so that tests and the simulator own time."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Where time comes from. Deadlines and leases use ``monotonic``; records use ``now``."""

    def now(self) -> datetime:
        """Wall-clock time, timezone-aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back, and goes on while the machine is suspended."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds`` (at once when zero or negative, after yielding to other tasks)."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        # Not CLOCK_MONOTONIC, which stands still while the machine is suspended: leases do not.
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
