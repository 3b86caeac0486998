"""The Storage contract in plain Python objects: for tests and simulation, never for state that must last.

No threads, no disk, no time of its own: the clock is a parameter, and with the same calls in the same order
it gives the same answers.
"""

import asyncio
import builtins
from bisect import bisect_left, insort
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, suppress

from hypervisor.core.clock import Clock
from hypervisor.core.errors import InvalidArgument
from hypervisor.server.store.election import Candidacy
from hypervisor.server.store.feed import ChangeFeed, HistoryChunk, compacted, follow
from hypervisor.server.store.leases import LeaseTimers
from hypervisor.server.store.storage import (
    Change,
    Committed,
    Compare,
    Conflicted,
    Delete,
    Election,
    Item,
    Lease,
    Operation,
    Page,
    Put,
    WatchBatch,
)
from hypervisor.server.store.validation import (
    check_commit,
    check_key,
    check_list,
    check_prefix,
    check_ttl,
    lease_not_found,
)

__all__ = ["MemoryStorage"]

_UNBOUNDED = 1 << 62
_EXPIRY_TICK_S = 1.0


class MemoryStorage:
    """Implements ``Storage``. Keeps its whole history until ``compact`` is called.

    The task that ends leases starts with the first lease and ends in ``aclose``; overdue leases are also
    ended before every operation, so no caller sees one outlive its time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._versions: dict[str, list[tuple[int, Item | None]]] = {}
        self._keys: list[str] = []
        self._oldest = 0
        self._feed = ChangeFeed(0, keep_revisions=_UNBOUNDED, keep_bytes=_UNBOUNDED)
        self._timers = LeaseTimers()
        self._lease_keys: dict[str, set[str]] = {}
        self._leases_granted = 0
        self._expiry: asyncio.Task[None] | None = None

    async def get(self, key: str) -> Item | None:
        """See ``Storage.get``."""
        check_key(key)
        self._begin()
        return self._current(key)

    async def list(
        self, prefix: str, *, start_key: str = "", limit: int = 1000, revision: int | None = None
    ) -> Page:
        """See ``Storage.list``."""
        check_list(prefix, start_key=start_key, limit=limit, revision=revision)
        self._begin()
        at = self._feed.newest if revision is None else revision
        self._check_position(at)
        items: builtins.list[Item] = []
        for key in self._keys[bisect_left(self._keys, start_key or prefix) :]:
            if not key.startswith(prefix):
                break
            item = next((i for r, i in reversed(self._versions[key]) if r <= at), None)
            if item is not None:
                if len(items) == limit:
                    return Page(tuple(items), at, key)
                items.append(item)
        return Page(tuple(items), at)

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        """See ``Storage.commit``."""
        check_commit(compares, operations)
        self._begin()
        current = {c.key: self._current(c.key) for c in compares}
        if any(_mod_revision(current[c.key]) != c.mod_revision for c in compares):
            return Conflicted(self._feed.newest, current)
        for operation in operations:
            lease_id = operation.lease_id if isinstance(operation, Put) else ""
            if lease_id and lease_id not in self._lease_keys:
                raise lease_not_found(lease_id)
        self._apply(operations)
        return Committed(self._feed.newest)

    def watch(
        self, prefix: str, *, after_revision: int, with_previous: bool = True
    ) -> AsyncGenerator[WatchBatch, None]:
        """See ``Storage.watch``. What was there before is at hand, and always told."""
        check_prefix(prefix)
        return self._watch(prefix, after_revision)

    async def grant_lease(self, ttl_s: float) -> Lease:
        """See ``Storage.grant_lease``."""
        check_ttl(ttl_s)
        self._begin()
        self._leases_granted += 1
        lease = Lease(f"{self._leases_granted:016x}", ttl_s)
        self._lease_keys[lease.id] = set()
        self._timers.add(lease.id, ttl_s, now=self._clock.monotonic())
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_for_ever(), name="memory-store-expiry")
        return lease

    async def keep_alive(self, lease_id: str) -> float:
        """See ``Storage.keep_alive``."""
        self._begin()
        return self._timers.renew(lease_id, now=self._clock.monotonic())

    async def revoke_lease(self, lease_id: str) -> None:
        """See ``Storage.revoke_lease``."""
        self._begin()
        self._end_lease(lease_id)

    def election(
        self, name: str, candidate_id: str, *, ttl_s: float
    ) -> AbstractAsyncContextManager[Election]:
        """See ``Storage.election``."""
        return Candidacy(self, name, candidate_id, ttl_s=ttl_s, clock=self._clock)

    async def compact(self, revision: int) -> None:
        """See ``Storage.compact``."""
        self._begin()
        if revision > self._feed.newest:
            newest = self._feed.newest
            raise InvalidArgument.of_field("revision", f"{revision} is newer than the store ({newest})")
        if revision <= self._oldest:
            return
        self._oldest = revision
        self._feed.trim(revision)
        for key, versions in list(self._versions.items()):
            last = max((n for n, (r, _) in enumerate(versions) if r <= revision), default=0)
            del versions[:last]
            if versions[0][0] <= revision and versions[0][1] is None:
                del versions[0]
            if not versions:
                del self._versions[key]
                del self._keys[bisect_left(self._keys, key)]

    async def current_revision(self) -> int:
        """See ``Storage.current_revision``."""
        self._begin()
        return self._feed.newest

    async def aclose(self) -> None:
        """See ``Storage.aclose``."""
        self._feed.close()
        if self._expiry is not None:
            self._expiry.cancel()
            with suppress(asyncio.CancelledError):
                await self._expiry
            self._expiry = None

    def _begin(self) -> None:
        self._feed.check_open()
        for lease_id in self._timers.take_due(self._clock.monotonic()):
            self._end_lease(lease_id)

    def _current(self, key: str) -> Item | None:
        versions = self._versions.get(key)
        return versions[-1][1] if versions else None

    def _check_position(self, revision: int) -> None:
        if not self._oldest <= revision <= self._feed.newest:
            raise compacted(revision, oldest=self._oldest, newest=self._feed.newest)

    def _apply(self, operations: Sequence[Operation]) -> None:
        revision = self._feed.newest + 1
        changes = []
        for operation in operations:
            previous = self._current(operation.key)
            if isinstance(operation, Delete):
                if previous is None:
                    continue
                item = None
            else:
                created = previous.create_revision if previous else revision
                item = Item(operation.key, operation.value, created, revision, operation.lease_id)
            if previous is not None and previous.lease_id:
                self._lease_keys[previous.lease_id].discard(operation.key)
            if item is not None and item.lease_id:
                self._lease_keys[item.lease_id].add(operation.key)
            if operation.key not in self._versions:
                self._versions[operation.key] = []
                insort(self._keys, operation.key)
            self._versions[operation.key].append((revision, item))
            changes.append(Change(operation.key, revision, item, previous))
        if changes:
            self._feed.publish([WatchBatch(revision, tuple(changes))])

    def _end_lease(self, lease_id: str) -> None:
        self._timers.remove(lease_id)
        keys = self._lease_keys.get(lease_id, set())
        self._apply([Delete(key) for key in sorted(keys)])
        self._lease_keys.pop(lease_id, None)

    async def _expire_for_ever(self) -> None:
        while True:
            deadline = self._timers.next_deadline()
            wait = _EXPIRY_TICK_S if deadline is None else deadline - self._clock.monotonic()
            await self._clock.sleep(min(max(wait, 0.0), _EXPIRY_TICK_S))
            self._begin()

    async def _watch(self, prefix: str, after_revision: int) -> AsyncGenerator[WatchBatch, None]:
        self._begin()
        self._check_position(after_revision)
        async for batch in follow(self._feed, prefix, after_revision=after_revision, history=self._history):
            yield batch

    async def _history(self, prefix: str, after_revision: int) -> HistoryChunk:
        # The feed holds everything that was not compacted, so a position it does not reach is gone.
        raise compacted(after_revision, oldest=self._oldest, newest=self._feed.newest)


def _mod_revision(item: Item | None) -> int:
    return 0 if item is None else item.mod_revision
