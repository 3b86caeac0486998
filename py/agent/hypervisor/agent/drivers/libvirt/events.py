"""What happens to virtual machines, out of libvirt's events, without a gap.

Events have no history, so each connection begins with a complete listing, taken after it was subscribed. Should an
event be lost all the same, the listing that is taken every now and then finds what it would have told.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

import structlog

from hypervisor.agent.drivers.libvirt.connection import Connection, DomainEvent, Session
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import Observation
from hypervisor.core.retry import Backoff

__all__ = ["EventFeed", "EventHandlers"]

_QUEUE = 1024
_PARALLEL = 16
_LOOK_EVERY_S = 30.0
_BACKOFF = Backoff(initial_s=0.1, maximum_s=2.0)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventHandlers:
    """What the driver does with events; each returns what the platform shall hear of."""

    on_event: Callable[[DomainEvent], Awaitable[Observation | None]]
    resync: Callable[[], Awaitable[tuple[Observation, ...]]]
    look: Callable[[], Awaitable[tuple[Observation, ...]]]


class EventFeed(AsyncIterator[Observation]):
    """Observations for ever; one consumer. Its task runs from the first ``anext`` to :meth:`aclose`.

    Events that come while nobody asks are dropped: the listing that a consumer begins with tells what they did. Should
    more than 1,024 wait, the oldest is dropped, counted, and a listing made up for it.
    """

    def __init__(
        self, connection: Connection, handlers: EventHandlers, *, clock: Clock, rng: random.Random
    ) -> None:
        self._connection = connection
        self._handlers = handlers
        self._clock = clock
        self._rng = rng
        self._incoming: asyncio.Queue[DomainEvent] = asyncio.Queue(_QUEUE)
        self._overflowed = asyncio.Event()
        self._queue: asyncio.Queue[Observation | None] = asyncio.Queue(_QUEUE)
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    def deliver(self, event: DomainEvent) -> None:
        """Take an event of the connection; never blocks."""
        if self._pump is None:
            return
        if self._incoming.full():
            self._incoming.get_nowait()
            self._overflowed.set()
        self._incoming.put_nowait(event)

    def __aiter__(self) -> "EventFeed":
        return self

    async def __anext__(self) -> Observation:
        if self._closed and self._pump is None:
            raise StopAsyncIteration
        if self._pump is None:
            self._pump = asyncio.create_task(self._run(), name="libvirt-events")
            self._pump.add_done_callback(self._wake_consumer)
        if self._pump.done() and self._queue.empty():
            return self._finish(self._pump)
        observation = await self._queue.get()
        return self._finish(self._pump) if observation is None else observation

    def _wake_consumer(self, pump: "asyncio.Task[None]") -> None:
        if pump is self._pump and not self._queue.full():
            # On a full queue nobody waits, and the end is seen when it is empty.
            self._queue.put_nowait(None)

    def _finish(self, pump: "asyncio.Task[None]") -> NoReturn:
        if not self._closed:
            self._pump = None
        if not pump.cancelled():
            # It runs for ever: that it ended is a defect, for the consumer to see.
            pump.result()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the feed. Idempotent."""
        self._closed = True
        if self._pump is not None and not self._pump.done():
            self._pump.cancel()
            await asyncio.wait({self._pump})

    async def _run(self) -> None:
        delays = _BACKOFF.delays(self._rng)
        told = ""
        while True:
            error = "the connection was lost"
            try:
                session = await self._connection.session()
                for observation in await self._handlers.resync():
                    await self._queue.put(observation)
                if told:
                    _log.info("libvirt_events_resumed")
                delays, told = _BACKOFF.delays(self._rng), ""
                await self._follow(session)
            except* HypervisorError as failures:
                error = str(_first_leaf(failures))
            if error != told:
                # Once, and not at every attempt of an outage.
                _log.warning("libvirt_events_interrupted", error=error)
                told = error
            await self._clock.sleep(next(delays))

    async def _follow(self, session: Session) -> None:
        """Handle events of one connection until it is lost."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._work()) for _ in range(_PARALLEL)]
            tasks.append(group.create_task(self._look_now_and_then()))
            await session.lost.wait()
            for task in tasks:
                task.cancel()

    async def _work(self) -> None:
        while True:
            observation = await self._handlers.on_event(await self._incoming.get())
            if observation is not None:
                await self._queue.put(observation)

    async def _look_now_and_then(self) -> None:
        while True:
            sleeping = asyncio.ensure_future(self._clock.sleep(_LOOK_EVERY_S))
            waiting = asyncio.ensure_future(self._overflowed.wait())
            try:
                await asyncio.wait({sleeping, waiting}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                sleeping.cancel()
                waiting.cancel()
            self._overflowed.clear()
            for observation in await self._handlers.look():
                await self._queue.put(observation)


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
