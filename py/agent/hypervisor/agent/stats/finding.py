"""Finding out where the figures of instances are: drivers are asked once a run, and again later when that fails."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError

__all__ = ["Finder"]

T = TypeVar("T")

_AT_ONCE = 16
_RETRY_S = 5.0
_RETRY_AT_MOST_S = 60.0

_log = structlog.get_logger(__name__)


class Finder(Generic[T]):
    """Calls ``find`` for the instances that wait, :data:`_AT_ONCE` at a time. ``find`` raises HypervisorError; the
    instance is then tried again after five seconds, and after twice as long each time it fails again, up to a minute,
    unless it was :meth:`forget`-ed. On the event loop."""

    def __init__(
        self,
        find: Callable[[str], Awaitable[T]],
        *,
        clock: Clock,
        failed: Callable[[str, HypervisorError], None],
    ) -> None:
        self._find = find
        self._clock = clock
        self._failed = failed
        self._waiting: dict[str, None] = {}
        self._retry_at: dict[str, float] = {}
        self._delays_s: dict[str, float] = {}
        """How long was waited last, of those that have not been found since."""
        self._asking: dict[str, asyncio.Lock] = {}
        self._wake = asyncio.Event()

    def want(self, instance_id: str) -> None:
        """Find it soon."""
        self._retry_at.pop(instance_id, None)
        self._waiting[instance_id] = None
        self._wake.set()

    def want_later(self, instance_id: str) -> None:
        """Find it in five seconds, or later when that has failed before."""
        delay_s = min(2 * self._delays_s.get(instance_id, _RETRY_S / 2), _RETRY_AT_MOST_S)
        self._delays_s[instance_id] = delay_s
        self._retry_at[instance_id] = self._clock.monotonic() + delay_s

    def forget(self, instance_id: str) -> None:
        """It need not be found any more."""
        self._waiting.pop(instance_id, None)
        self._retry_at.pop(instance_id, None)
        self._delays_s.pop(instance_id, None)

    def look(self) -> None:
        """Take up what is to be tried again by now; called every now and then."""
        if self._retry_at:
            now = self._clock.monotonic()
            for instance_id in [i for i, at in self._retry_at.items() if at <= now]:
                self.want(instance_id)

    async def find(self, instance_id: str) -> T:
        """Find it now; several that ask at once are served one after another. Raises HypervisorError."""
        lock = self._asking.setdefault(instance_id, asyncio.Lock())
        try:
            async with lock:
                found = await self._find(instance_id)
            self._delays_s.pop(instance_id, None)
            return found
        finally:
            if not lock.locked() and self._asking.get(instance_id) is lock:
                del self._asking[instance_id]

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Find what waits, for ever, in tasks of ``group``."""
        gate = asyncio.Semaphore(_AT_ONCE)
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await gate.acquire()
                if not self._waiting:
                    gate.release()
                    break
                instance_id = next(iter(self._waiting))
                del self._waiting[instance_id]
                group.create_task(self._find_waiting(instance_id, gate))

    async def _find_waiting(self, instance_id: str, gate: asyncio.Semaphore) -> None:
        try:
            await self.find(instance_id)
        except HypervisorError as exc:
            _log.debug("stats_source_not_found", instance=instance_id, reason=exc.reason, error=exc.message)
            self._failed(instance_id, exc)
        finally:
            gate.release()
