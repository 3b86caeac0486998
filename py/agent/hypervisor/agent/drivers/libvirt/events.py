"""What happens to virtual machines, out of libvirt's events, without a gap.

Events have no history, so each connection begins with a complete listing, taken after it was subscribed. Should an
event be lost all the same, the listing that is taken every now and then finds what it would have told.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from hypervisor.agent.drivers.libvirt.connection import Connection, DomainEvent, Session
from hypervisor.agent.drivers.pumped_feed import PumpedFeed, first_leaf
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


class EventFeed(PumpedFeed):
    """Observations for ever; one consumer. Its task runs from the first ``anext`` to :meth:`aclose`.

    Events that come while nobody asks are dropped: the listing that a consumer begins with tells what they did. Should
    more than 1,024 wait, the oldest is dropped, counted, and a listing made up for it.
    """

    def __init__(
        self, connection: Connection, handlers: EventHandlers, *, clock: Clock, rng: random.Random
    ) -> None:
        super().__init__("libvirt-events")
        self._connection = connection
        self._handlers = handlers
        self._clock = clock
        self._rng = rng
        self._incoming: asyncio.Queue[DomainEvent] = asyncio.Queue(_QUEUE)
        self._overflowed = asyncio.Event()

    def deliver(self, event: DomainEvent) -> None:
        """Take an event of the connection; never blocks."""
        if not self._begun:
            return
        if self._incoming.full():
            self._incoming.get_nowait()
            self._overflowed.set()
        self._incoming.put_nowait(event)

    async def _run(self) -> None:
        delays = _BACKOFF.delays(self._rng)
        told = ""
        while True:
            error = "the connection was lost"
            try:
                session = await self._connection.session()
                for observation in await self._handlers.resync():
                    await self._tell(observation)
                if told:
                    _log.info("libvirt_events_resumed")
                delays, told = _BACKOFF.delays(self._rng), ""
                await self._follow(session)
            except* HypervisorError as failures:
                error = str(first_leaf(failures))
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
                await self._tell(observation)

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
                await self._tell(observation)
