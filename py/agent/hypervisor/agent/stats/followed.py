"""One instance that the statistics service follows: its slot in the sampler, and who watches it. On the event loop."""

import asyncio
from datetime import datetime

from hypervisor.agent.stats.sources import StatsFeed

__all__ = ["Followed"]


class Followed:
    """``feed`` is None where the sampler reads files. ``started_at`` tells one run from the next."""

    def __init__(
        self, instance_id: str, *, slot: int, feed: StatsFeed | None, started_at: datetime | None
    ) -> None:
        self.instance_id = instance_id
        self.slot = slot
        self.feed = feed
        self.started_at = started_at
        self.ended = False
        self.sampled = False
        """Whether there is a sample of it."""
        self.fast: asyncio.Task[None] | None = None
        """Samples it more often than the others, while somebody wants that."""
        self._intervals: list[float] = []
        self._news = asyncio.Event()

    @property
    def watched(self) -> bool:
        """Whether anybody watches it."""
        return bool(self._intervals)

    def join(self, interval_s: float) -> None:
        """Somebody watches it, and wants a sample this often."""
        self._intervals.append(interval_s)

    def leave(self, interval_s: float) -> None:
        """One who joined with this interval does not watch it any more."""
        self._intervals.remove(interval_s)

    def wanted_s(self) -> float | None:
        """The shortest interval somebody wants; None when nobody watches."""
        return min(self._intervals, default=None)

    def tell(self) -> None:
        """There is a new sample, or there will be none any more."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def news(self) -> None:
        """Wait for the next :meth:`tell`."""
        await self._news.wait()
