"""The store as servers see it over the network: linearizable behind, unreliable in between.

:class:`SimStore` is one ``MemoryStorage`` for all; it can be down or slow, and change its leader.
:class:`StoreClient` is one server's way to it: answers get lost, watches break and lose events.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from hvsim.clock import SimClock
from hvsim.loop import Process, SimLoop
from hvsim.network import Network
from hypervisor.core.errors import Unavailable
from hypervisor.server.store.election import Candidacy
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import (
    Change,
    Committed,
    Compare,
    Conflicted,
    Election,
    Item,
    Lease,
    Operation,
    OutcomeUnknown,
    Page,
    WatchBatch,
)

__all__ = ["STORE_HOST", "SimStore", "StoreClient"]

STORE_HOST = "store"
_DIAL_S = 2.0
_ANSWER_S = 5.0

T = TypeVar("T")


class SimStore(MemoryStorage):
    """See the module's docstring. ``observer`` is told of every revision before anybody else."""

    def __init__(self, loop: SimLoop, observer: Callable[[int, tuple[Change, ...]], None]) -> None:
        super().__init__(SimClock(loop))
        self._loop = loop
        self._observer = observer
        self.down = False
        self.slow_s = 0.0

    async def open(self) -> None:
        """Start the task that ends leases, as the store's own."""
        lease = await self.grant_lease(1.0)
        await self.revoke_lease(lease.id)

    def take_down(self) -> None:
        """Nobody leads: nothing is answered, and no lease ends."""
        self.down = True

    def bring_up(self) -> None:
        """A new leader: every lease gets a whole TTL."""
        self.down = False
        for lease_id in list(self._lease_keys):
            timer = self._timers._timers.get(lease_id)
            if timer is not None:
                timer.deadline = self._loop.time() + timer.ttl_s

    async def end_lease_early(self, lease_id: str) -> None:
        """An operator revokes it."""
        await self.revoke_lease(lease_id)

    def lease_ids(self) -> list[str]:
        """Leases that exist."""
        return sorted(self._lease_keys)

    def _begin(self) -> None:
        if self.down:
            self._feed.check_open()
        else:
            super()._begin()

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if not self._feed._closed:
                self._begin()

    def _apply(self, operations: Sequence[Operation]) -> None:
        before = self._feed.newest
        super()._apply(operations)
        if self._feed.newest > before:
            (batch,) = self._feed.after(before) or ()
            self._observer(batch.revision, batch.changes)


class StoreClient:
    """Implements ``Storage`` for one server. ``forget_events``: so many batches of its watches are silently lost."""

    def __init__(
        self, store: SimStore, network: Network, process: Process, rng: random.Random, clock: SimClock
    ) -> None:
        self._store = store
        self._network = network
        self._process = process
        self._rng = rng
        self._clock = clock
        self.forget_events = 0

    async def get(self, key: str) -> Item | None:
        return await self._ask(lambda: self._store.get(key))

    async def list(
        self, prefix: str, *, start_key: str = "", limit: int = 1000, revision: int | None = None
    ) -> Page:
        return await self._ask(
            lambda: self._store.list(prefix, start_key=start_key, limit=limit, revision=revision)
        )

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        await self._go()
        if self._store.slow_s:
            await asyncio.sleep(self._rng.uniform(0.0, self._store.slow_s))
        await asyncio.sleep(self._rng.uniform(0.001, 0.004))
        if not self._reached():
            raise _unreachable()
        outcome = await self._store.commit(compares, operations)
        if not await self._back():
            # Its answer is lost and cannot be settled in time.
            raise OutcomeUnknown("the store did not answer whether it took the commit", retry_after_s=1.0)
        return outcome

    async def _watch(self, prefix: str, after_revision: int) -> AsyncGenerator[WatchBatch, None]:
        await self._go()
        async for batch in self._store.watch(prefix, after_revision=after_revision):
            await asyncio.sleep(self._network.delay_s())
            while not self._reached():  # noqa: ASYNC110 (faults have no event)
                await asyncio.sleep(self._rng.uniform(0.05, 0.5))
            if self.forget_events > 0:
                self.forget_events -= 1
                continue
            yield batch

    def watch(
        self, prefix: str, *, after_revision: int, with_previous: bool = True
    ) -> AsyncGenerator[WatchBatch, None]:
        return self._watch(prefix, after_revision)

    async def grant_lease(self, ttl_s: float) -> Lease:
        return await self._ask(lambda: self._store.grant_lease(ttl_s))

    async def keep_alive(self, lease_id: str) -> float:
        return await self._ask(lambda: self._store.keep_alive(lease_id))

    async def revoke_lease(self, lease_id: str) -> None:
        await self._ask(lambda: self._store.revoke_lease(lease_id))

    def election(
        self, name: str, candidate_id: str, *, ttl_s: float
    ) -> AbstractAsyncContextManager[Election]:
        return Candidacy(self, name, candidate_id, ttl_s=ttl_s, clock=self._clock)

    async def compact(self, revision: int) -> None:
        await self._ask(lambda: self._store.compact(revision))

    async def current_revision(self) -> int:
        return await self._ask(self._store.current_revision)

    async def aclose(self) -> None:
        """Nothing is open."""

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        await self._go()
        answer = await question()
        if not await self._back():
            raise _unreachable()
        return answer

    async def _go(self) -> None:
        """The request travels; Unavailable when it does not arrive."""
        await asyncio.sleep(self._network.delay_s())
        if self._network.lost() or not self._reached():
            await asyncio.sleep(self._rng.uniform(0.1, _DIAL_S))
            raise _unreachable()

    async def _back(self) -> bool:
        """The answer travels; whether it arrives."""
        await asyncio.sleep(self._network.delay_s())
        arrives = not self._network.lost() and self._network.reaches(STORE_HOST, self._process.host)
        if not arrives:
            await asyncio.sleep(self._rng.uniform(0.5, _ANSWER_S))
        return arrives

    def _reached(self) -> bool:
        network, host = self._network, self._process.host
        return (
            not self._store.down and network.reaches(host, STORE_HOST) and network.reaches(STORE_HOST, host)
        )


def _unreachable() -> Unavailable:
    return Unavailable("the store cannot be reached", reason="STORE_UNAVAILABLE", retry_after_s=1.0)
