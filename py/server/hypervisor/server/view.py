"""The whole cluster in memory, true at one revision, fed by a list and the store's watch. Implements ``ClusterView``.

* Each value is decoded once, whoever reads it, and this server's own commits not at all (:meth:`StoreView.offer`).
* ``changes`` serves watchers from a window of recent changes, and from the store's history where that does not reach.
* The watch is not trusted alone: every ``verify_interval_s`` the view asks the store for its revision (which also
  tells whether it can be reached: ``stale``), and every ``relist_interval_s`` it lists everything and compares. A
  difference that the watch should have told is repaired, logged, and told to watchers as changes.
* A store whose revision goes back is another one (restored from a backup): nothing in memory is true any more, and
  ``run`` ends with ``FailedPrecondition`` (``STORE_REPLACED``), for the server to be started anew.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import msgspec
import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, Unavailable
from hypervisor.core.images import Image
from hypervisor.core.model import Allocation, Instance, Node, OperationRecord
from hypervisor.server import keys
from hypervisor.server.cluster_state import ClusterState, Update, cluster_changes, decode_item
from hypervisor.server.draining.records import Budget, DrainRecord
from hypervisor.server.keys import RecordKey
from hypervisor.server.recent_changes import RecentChanges
from hypervisor.server.records import ServerRecord
from hypervisor.server.services import ClusterChange, Versioned
from hypervisor.server.store.storage import Compacted, Item, Storage, WatchBatch

__all__ = ["StoreView", "ViewSettings"]

T = TypeVar("T", bound=msgspec.Struct)
Listener = Callable[[tuple[ClusterChange, ...]], None]
RecordListener = Callable[[tuple[Update, ...]], None]

_OFFERS_KEPT = 16

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """How much the view keeps and how often it checks itself, in seconds."""

    keep_changes: int = 20_000
    verify_interval_s: float = 2.0
    relist_interval_s: float = 60.0
    lag_timeout_s: float = 5.0
    progress_interval_s: float = 10.0
    retry_s: float = 0.5
    wait_timeout_s: float = 30.0


class StoreView:
    """See ``ClusterView`` for what it promises. ``run`` feeds it; ``loaded`` returns when it can be read."""

    def __init__(self, storage: Storage, clock: Clock, *, settings: ViewSettings | None = None) -> None:
        self._storage = storage
        self._clock = clock
        self._settings = settings or ViewSettings()
        self._state = ClusterState()
        self._recent = RecentChanges(keep_changes=self._settings.keep_changes)
        self._loaded = asyncio.Event()
        self._suspected = asyncio.Event()
        self._distrusted = False
        self._stale = True
        self._listeners: list[Listener] = []
        self._record_listeners: list[RecordListener] = []
        self._deleted: dict[str, int] | None = None
        self._repairs = 0
        self._offered: dict[int, Iterable[Update]] = {}
        self._expected: dict[str, Mapping[str, tuple[bytes, msgspec.Struct]]] = {}

    # --- reading

    @property
    def revision(self) -> int:
        return self._state.revision

    @property
    def stale(self) -> bool:
        return self._stale

    @property
    def repairs(self) -> int:
        """How many records a comparison with the store had to mend, since the start: changes the watch never told."""
        return self._repairs

    def find(self, key: RecordKey[T]) -> Versioned[T] | None:
        """Any record by its key. Raises ``Internal`` where there is one that cannot be read."""
        return self._state.find(key)

    def mod_revision(self, path: str) -> int:
        """Revision of the last change of a record; 0 where there is none."""
        return self._state.mod_revision(path)

    def instance(self, instance_id: str) -> Versioned[Instance] | None:
        return self._state.instances.get(instance_id)

    def instance_named(self, project: str, name: str) -> Versioned[Instance] | None:
        return self._state.instance_named(project, name)

    def instances(self) -> Iterable[Versioned[Instance]]:
        return self._state.instances.values()

    def instances_on(self, node_id: str) -> Iterable[Versioned[Instance]]:
        return self._state.instances_on(node_id)

    def node(self, node_id: str) -> Versioned[Node] | None:
        return self._state.nodes.get(node_id)

    def node_named(self, hostname: str) -> Versioned[Node] | None:
        return self._state.node_named(hostname)

    def nodes(self) -> Iterable[Versioned[Node]]:
        return self._state.nodes.values()

    def allocation(self, node_id: str) -> Allocation:
        found = self._state.allocations.get(node_id)
        return found.value if found is not None else Allocation(node_id=node_id)

    def operation(self, operation_id: str) -> Versioned[OperationRecord] | None:
        return self._state.operations.get(operation_id)

    def operation_of_request(self, request_id: str) -> Versioned[OperationRecord] | None:
        return self._state.operation_of_request(request_id)

    def operations(self) -> Iterable[Versioned[OperationRecord]]:
        return self._state.operations.values()

    def unfinished_operations(self) -> Iterable[Versioned[OperationRecord]]:
        """Operations that have not ended: few, where ``operations`` has the history of a day."""
        return self._state.unfinished.values()

    def images(self) -> Iterable[Versioned[Image]]:
        """All images."""
        return self._state.images.values()

    def image_names(self, digest: str) -> tuple[str, ...]:
        """Names of the images that have this content."""
        return tuple(self._state.image_names.get(digest, {}).values())

    def drain(self, node_id: str) -> Versioned[DrainRecord] | None:
        """The last drain of the node, or return to it, under way or over."""
        return self._state.drains.get(node_id)

    def drains(self) -> Iterable[Versioned[DrainRecord]]:
        """All of them."""
        return self._state.drains.values()

    def budgets(self) -> Iterable[Versioned[Budget]]:
        """All disruption budgets."""
        return self._state.budgets.values()

    def node_alive(self, node_id: str) -> bool:
        """Whether the node's lease exists."""
        return self._state.mod_revision(keys.node_lease(node_id).path) > 0

    def servers(self) -> tuple[ServerRecord, ...]:
        """Servers that are alive."""
        return self._state.servers()

    def leader_id(self) -> str:
        """Id of the server that leads; empty while none does."""
        return self._state.leader_id()

    def cluster_id(self) -> str:
        """The cluster's id; empty before the first server has written it."""
        config = self._state.find(keys.CLUSTER_CONFIG)
        return config.value.cluster_id if config is not None else ""

    def records_since(self) -> datetime | None:
        """When the store was begun, or last restored; None before the first server has written it."""
        config = self._state.find(keys.CLUSTER_CONFIG)
        return None if config is None else config.value.restored_at or config.value.created_at

    @property
    def restoring(self) -> bool:
        """Whether the records of a backup are being put in, or a restore broke off."""
        return self._state.mod_revision(keys.RESTORING.path) > 0

    # --- following

    async def loaded(self) -> None:
        """Return once the first list of the store is in."""
        await self._loaded.wait()

    async def wait_revision(self, revision: int) -> None:
        """See ``ClusterView``. ``Unavailable`` (``VIEW_BEHIND``) when the watch does not get there in time."""
        if self._state.revision >= revision:
            return
        try:
            async with asyncio.timeout(self._settings.wait_timeout_s):
                while self._state.revision < revision:
                    await self._recent.wait()
        except TimeoutError:
            self.suspect()
            raise Unavailable(
                f"this server has seen the store up to revision {self.revision}, not yet {revision}: try again",
                reason="VIEW_BEHIND",
                metadata={"revision": str(self.revision), "wanted": str(revision)},
                retry_after_s=1.0,
            ) from None

    async def catch_up(self) -> bool:
        """Reach what the store holds now; whether something was missing. ``Unavailable`` where that cannot be had."""
        newest = await self._storage.current_revision()
        if newest <= self._state.revision:
            return False
        await self.wait_revision(newest)
        return True

    def add_listener(self, listener: Listener) -> None:
        """Have ``listener`` called at once with every change. For this server's own parts: it must not raise."""
        self._listeners.append(listener)

    def add_record_listener(self, listener: RecordListener) -> None:
        """Have ``listener`` called at once with every change of any record, before the listeners of changes."""
        self._record_listeners.append(listener)

    async def changes(self, *, after_revision: int | None) -> AsyncGenerator[tuple[ClusterChange, ...], None]:
        """See ``ClusterView``."""
        seen = self._state.revision if after_revision is None else after_revision
        position: int | None = self._recent.end if after_revision is None else None
        if seen > self._state.revision:
            await self._check_exists(seen)
        while True:
            if position is None or not self._recent.holds(position):
                position = self._recent.position_after(seen)
                if position is None:
                    async with aclosing(self._history(seen)) as history:
                        async for revision, changes in history:
                            seen = revision
                            if changes:
                                yield changes
                            if seen >= self._recent.floor:
                                break
                    continue
            batch = self._recent.at(position)
            if batch is not None:
                position += 1
                seen = max(seen, batch.revision)
                yield batch.changes
                continue
            # All this view knows was delivered.
            seen = max(seen, self._state.revision)
            quiet = False
            try:
                async with asyncio.timeout(self._settings.progress_interval_s):
                    await self._recent.wait()
            except TimeoutError:
                quiet = True
            if quiet and position == self._recent.end:
                yield ()

    async def _check_exists(self, revision: int) -> None:
        newest = await self._storage.current_revision()
        if revision > newest:
            raise Compacted(
                f"revision {revision} is not one of this store's, whose newest is {newest}: list again",
                metadata={"revision": str(revision), "newest": str(newest)},
            )
        await self.wait_revision(revision)

    async def _history(self, after: int) -> AsyncGenerator[tuple[int, tuple[ClusterChange, ...]], None]:
        async with aclosing(self._storage.watch(keys.PREFIX, after_revision=after)) as batches:
            async for batch in batches:
                pairs = (
                    (decode_item(c.key, c.item).record, decode_item(c.key, c.previous).record)
                    for c in batch.changes
                )
                yield batch.revision, cluster_changes(batch.revision, pairs)

    # --- feeding

    def offer(self, revision: int, updates: Iterable[Update]) -> None:
        """What this server's own commit wrote at ``revision``: taken as soon as nothing is missing before it.

        If the watch has not brought it by then.
        """
        if not self._loaded.is_set() or revision <= self._state.revision:
            return
        self._offered[revision] = updates
        while (offered := self._offered.pop(self._state.revision + 1, None)) is not None:
            self._apply(self._state.revision + 1, offered)
        if len(self._offered) > _OFFERS_KEPT:
            self._offered = {at: kept for at, kept in self._offered.items() if at > self._state.revision}

    def expect(self, source: str, writes: Mapping[str, tuple[bytes, msgspec.Struct]]) -> None:
        """This server is about to commit these values (as stored, and as records): when the watch is first to tell
        of them, they are taken as they are instead of decoded. Replaces what ``source`` expected before."""
        self._expected[source] = writes

    def suspect(self) -> None:
        """Somebody saw the store fail: check now whether it can be reached."""
        self._suspected.set()

    def distrust(self) -> None:
        """Somebody saw that the view lacks a change: list and compare now."""
        self._distrusted = True
        self._suspected.set()

    async def run(self) -> None:
        """Feed the view until cancelled."""
        await self._load_when_possible()
        async with asyncio.TaskGroup() as group:
            follower = group.create_task(self._follow(), name="view-follow")
            silent = False
            last_relist = self._clock.monotonic()
            while True:
                await self._pause()
                behind = await self._probe()
                due = (
                    self._distrusted
                    or self._clock.monotonic() - last_relist >= self._settings.relist_interval_s
                )
                if behind is None:
                    continue
                if not behind and not due:
                    silent = False
                    continue
                outcome = await self._compare(repair_lag=silent)
                if outcome is None:
                    continue
                last_relist = self._clock.monotonic()
                self._distrusted = False
                if outcome:
                    silent = False
                else:
                    # Events are there and do not come: a new watch from here brings them all, in order. Where
                    # even that does not help, the next comparison repairs by value.
                    log.warning("view_watch_silent", revision=self.revision)
                    silent = True
                    follower.cancel()
                    follower = group.create_task(self._follow(), name="view-follow")

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._settings.verify_interval_s):
                await self._suspected.wait()
        except TimeoutError:
            pass
        else:
            self._suspected.clear()

    async def _probe(self) -> bool | None:
        """Whether the view stays behind the store; None when the store cannot be reached."""
        seen = self._state.revision
        try:
            async with asyncio.timeout(self._settings.lag_timeout_s):
                newest = await self._storage.current_revision()
        except (HypervisorError, TimeoutError) as exc:
            self._set_stale(str(exc) or "no answer in time")
            return None
        _check_same_store(newest, seen=seen)
        caught_up = await self._reached(newest)
        if caught_up:
            self._set_stale("")
        return not caught_up

    async def _reached(self, revision: int) -> bool:
        try:
            async with asyncio.timeout(self._settings.lag_timeout_s):
                while self._state.revision < revision:
                    await self._recent.wait()
        except TimeoutError:
            return False
        return True

    def _set_stale(self, cause: str) -> None:
        if bool(cause) != self._stale:
            self._stale = bool(cause)
            log.warning("view_stale", error=cause) if cause else log.info(
                "view_fresh", revision=self.revision
            )

    async def _follow(self) -> None:
        while True:
            try:
                watch = self._storage.watch(
                    keys.PREFIX, after_revision=self._state.revision, with_previous=False
                )
                async with aclosing(watch) as batches:
                    async for batch in batches:
                        self._receive(batch)
            except Compacted as exc:
                log.warning("view_compacted", revision=self.revision, error=str(exc))
                await self._load_when_possible()
            except HypervisorError as exc:
                self._set_stale(str(exc))
                await self._clock.sleep(self._settings.retry_s)

    def _receive(self, batch: WatchBatch) -> None:
        if batch.revision > self._state.revision:
            self._apply(batch.revision, [self._update(c.key, c.item) for c in batch.changes])

    def _update(self, path: str, item: Item | None) -> Update:
        if item is not None:
            for writes in self._expected.values():
                expected = writes.get(path)
                if expected is not None and expected[0] == item.value:
                    return Update(path, Versioned(expected[1], item.mod_revision))
        return decode_item(path, item)

    def _apply(self, revision: int, updates: Iterable[Update]) -> None:
        updates = tuple(updates)
        if self._deleted is not None:
            self._deleted.update((u.path, revision) for u in updates if u.deleted)
        changes = self._state.apply(revision, updates)
        self._recent.append(revision, changes)
        for record_listener in self._record_listeners:
            record_listener(updates)
        if changes:
            for listener in self._listeners:
                listener(changes)

    async def _load_when_possible(self) -> None:
        while True:
            seen = self._state.revision
            try:
                revision, items = await self._list()
            except HypervisorError as exc:
                self._set_stale(str(exc))
                log.warning("view_list_failed", reason=exc.reason, error=str(exc))
                await self._clock.sleep(self._settings.retry_s)
                continue
            _check_same_store(revision, seen=seen)
            first = not self._loaded.is_set()
            self._apply(max(revision, self._state.revision), self._differences(revision, items))
            # The differences are not the changes that made them: who follows gets those from the store's history, or
            # is told that they are gone.
            self._recent.reset(self._state.revision)
            if first:
                log.info("view_loaded", revision=self.revision, keys=len(items))
            self._set_stale("")
            self._loaded.set()
            return

    async def _list(self) -> tuple[int, dict[str, Item]]:
        items: dict[str, Item] = {}
        start, revision = "", None
        while True:
            page = await self._storage.list(keys.PREFIX, start_key=start, revision=revision)
            items.update((item.key, item) for item in page.items)
            start, revision = page.next_key, page.revision
            if not start:
                return revision, items

    async def _compare(self, *, repair_lag: bool) -> bool | None:
        """List everything and compare. True: it agrees now. False: the watch is silent. None: could not compare."""
        self._deleted = {}
        try:
            revision, items = await self._list()
            caught_up = await self._reached(revision)
            updates = self._differences(revision, items)
        except HypervisorError as exc:
            self._set_stale(str(exc))
            return None
        finally:
            self._deleted = None
        if updates and not caught_up and not repair_lag:
            return False
        if updates:
            self._repairs += len(updates)
            log.error(
                "view_repaired", revision=revision, keys=[u.path for u in updates[:20]], count=len(updates)
            )
        if updates or not caught_up:
            self._apply(max(revision, self._state.revision), updates)
        self._set_stale("")
        return True

    def _differences(self, revision: int, items: dict[str, Item]) -> tuple[Update, ...]:
        """What the state has to change to hold what the list of ``revision`` shows, and whatever came after it."""
        found = []
        held = dict(self._state.paths())
        gone = {path for path, mod in held.items() if mod <= revision and path not in items}
        for path, item in items.items():
            if held.get(path, 0) < item.mod_revision:
                deleted_later = self._deleted is not None and self._deleted.get(path, 0) > revision
                if not deleted_later:
                    update = decode_item(path, item)
                    if update.raw is None or path.startswith(keys.LEADER_PREFIX):
                        found.append(update)
        found.extend(Update(path, None) for path in gone)
        return tuple(found)


def _check_same_store(revision: int, *, seen: int) -> None:
    """Raise unless the store, asked after this server had seen ``seen``, is at least there."""
    if revision < seen:
        raise FailedPrecondition(
            f"the store went back from revision {seen} to {revision}, as after a restored backup: what this server "
            "knows is not true any more; start it anew",
            reason="STORE_REPLACED",
            metadata={"revision": str(revision), "seen": str(seen)},
        )
