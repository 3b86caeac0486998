"""The one retry helper: exponential back-off with full jitter, bounded in time and in attempts."""

import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Unavailable

__all__ = ["Backoff", "retry"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between attempts, in seconds: ``initial_s`` doubled (``factor``) up to ``maximum_s``.

    Each delay is drawn from [delay/2, delay], so that many callers do not come back at the same moment.
    """

    initial_s: float = 0.1
    maximum_s: float = 5.0
    factor: float = 2.0

    def delays(self, rng: random.Random) -> Iterator[float]:
        """An endless sequence of delays."""
        delay = self.initial_s
        while True:
            yield delay * (0.5 + rng.random() / 2)
            delay = min(delay * self.factor, self.maximum_s)


async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    clock: Clock,
    rng: random.Random,
    backoff: Backoff,
    attempts: int,
    on: tuple[type[HypervisorError], ...] = (Unavailable,),
) -> T:
    """Await ``call()`` until it succeeds, raises something not in ``on``, or ``attempts`` are used up.

    Only for calls that are safe to repeat. The last error is raised unchanged.
    """
    delays = backoff.delays(rng)
    for attempt in range(1, attempts + 1):
        try:
            return await call()
        except on as exc:
            if attempt == attempts:
                raise
            await clock.sleep(max(next(delays), exc.retry_after_s or 0.0))
    raise ValueError("attempts must be at least 1")
