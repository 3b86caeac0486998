"""The embedded store: one SQLite file for one server, in WAL mode, durable at every commit.

Writing goes through one thread (:mod:`sqlite_writer`), reading through a few others with connections of
their own, so that the event loop never waits for the disk and reads never wait for writes. Watches are fed
from memory (:mod:`feed`) and, further back, from the history in the file.
"""

import asyncio
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from typing import TypeVar

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, Unavailable
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.election import Candidacy
from hypervisor.server.store.feed import ChangeFeed, HistoryChunk, follow
from hypervisor.server.store.leases import LeaseTimers
from hypervisor.server.store.sqlite_engine import Engine
from hypervisor.server.store.sqlite_errors import translate
from hypervisor.server.store.sqlite_file import FileLock, open_reader, open_writer
from hypervisor.server.store.sqlite_rows import (
    check_position,
    read_history,
    read_item,
    read_page,
    read_revision,
    snapshot,
)
from hypervisor.server.store.sqlite_writer import SqliteWriter
from hypervisor.server.store.storage import (
    Committed,
    Compare,
    Conflicted,
    Election,
    Item,
    Lease,
    Operation,
    OutcomeUnknown,
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
    store_closed,
)

__all__ = ["SqliteStorage"]

T = TypeVar("T")

_READERS = 2
_PENDING_WRITES = 4096
_FEED_REVISIONS = 8192
_FEED_BYTES = 64_000_000
_EXPIRY_TICK_S = 1.0
_HOUSEKEEPING_S = 10.0

log = structlog.get_logger(__name__)


class SqliteStorage:
    """Implements ``Storage``. Open it with ``SqliteStorage.open``, which owns the file until ``aclose``."""

    def __init__(
        self,
        config: StoreConfig,
        *,
        clock: Clock,
        lock: FileLock,
        writer: SqliteWriter,
        feed: ChangeFeed,
        timers: LeaseTimers,
        new_lease_id: Callable[[], str],
    ) -> None:
        self._config = config
        self._path = config.path
        self._clock = clock
        self._lock = lock
        self._writer = writer
        self._feed = feed
        self._timers = timers
        self._new_lease_id = new_lease_id
        self._admission = asyncio.Semaphore(_PENDING_WRITES)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._reader = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []
        self._revision_samples: deque[tuple[float, int]] = deque()
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, config: StoreConfig, *, clock: Clock) -> "SqliteStorage":
        """Take the file's lock, open or create it, and start the store's threads and tasks.

        Every lease found gets one whole TTL, so that a restart of the server ends none of them.
        """
        if not config.path:
            raise FailedPrecondition(
                "store.path is empty: name the database file", reason="STORE_PATH_MISSING"
            )
        lock = FileLock(config.path)
        lock.acquire()
        try:
            connection = await asyncio.to_thread(open_writer, config.path, max_bytes=config.max_bytes)
        except BaseException:
            lock.release()
            raise
        try:
            engine = Engine(connection)
            leases = engine.leases()
        except sqlite3.Error as exc:
            connection.close()
            lock.release()
            raise translate(exc, config.path) from exc
        feed = ChangeFeed(engine.revision, keep_revisions=_FEED_REVISIONS, keep_bytes=_FEED_BYTES)
        loop = asyncio.get_running_loop()
        writer = SqliteWriter(connection, engine, config.path, publish=feed.publish, loop=loop)
        timers = LeaseTimers()
        for lease in leases:
            timers.add(lease.id, lease.ttl_s, now=clock.monotonic())
        storage = cls(
            config,
            clock=clock,
            lock=lock,
            writer=writer,
            feed=feed,
            timers=timers,
            new_lease_id=lambda: secrets.token_hex(8),
        )
        writer.start()
        storage._tasks = (
            asyncio.create_task(storage._expire_for_ever(), name="store-lease-expiry"),
            asyncio.create_task(storage._compact_for_ever(), name="store-compaction"),
        )
        log.info("store_opened", path=config.path, revision=engine.revision, leases=len(leases))
        return storage

    async def get(self, key: str) -> Item | None:
        """See ``Storage.get``."""
        check_key(key)
        return await self._read(lambda connection: read_item(connection, key))

    async def list(
        self, prefix: str, *, start_key: str = "", limit: int = 1000, revision: int | None = None
    ) -> Page:
        """See ``Storage.list``."""
        check_list(prefix, start_key=start_key, limit=limit, revision=revision)

        def read(connection: sqlite3.Connection) -> Page:
            with snapshot(connection):
                return read_page(connection, prefix, start_key=start_key, limit=limit, revision=revision)

        return await self._read(read)

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        """See ``Storage.commit``."""
        check_commit(compares, operations)
        weight = sum(len(o.value) for o in operations if isinstance(o, Put))
        # The caller's sequences may change before the thread comes to them.
        held, wanted = tuple(compares), tuple(operations)
        return await self._write(lambda engine: engine.apply(held, wanted), weight=weight)

    def watch(
        self, prefix: str, *, after_revision: int, with_previous: bool = True
    ) -> AsyncGenerator[WatchBatch, None]:
        """See ``Storage.watch``. What was there before is at hand, and always told."""
        check_prefix(prefix)
        return self._watch(prefix, after_revision)

    async def grant_lease(self, ttl_s: float) -> Lease:
        """See ``Storage.grant_lease``."""
        check_ttl(ttl_s)
        lease = Lease(self._new_lease_id(), ttl_s)
        # The timer stands before the lease does: a caller cancelled meanwhile leaves none that never ends.
        self._timers.add(lease.id, ttl_s, now=self._clock.monotonic())
        await self._write(lambda engine: engine.grant(lease))
        self._timers.add(lease.id, ttl_s, now=self._clock.monotonic())
        return lease

    async def keep_alive(self, lease_id: str) -> float:
        """See ``Storage.keep_alive``. Writes nothing: deadlines are in memory."""
        self._feed.check_open()
        return self._timers.renew(lease_id, now=self._clock.monotonic())

    async def revoke_lease(self, lease_id: str) -> None:
        """See ``Storage.revoke_lease``."""
        await self._end_lease(lease_id)

    def election(
        self, name: str, candidate_id: str, *, ttl_s: float
    ) -> AbstractAsyncContextManager[Election]:
        """See ``Storage.election``."""
        return Candidacy(self, name, candidate_id, ttl_s=ttl_s, clock=self._clock)

    async def compact(self, revision: int) -> None:
        """See ``Storage.compact``."""
        await self._write(lambda engine: engine.compact(revision))
        while await self._write(lambda engine: engine.purge()):
            pass

    async def current_revision(self) -> int:
        """See ``Storage.current_revision``."""
        return await self._read(read_revision)

    async def aclose(self) -> None:
        """See ``Storage.aclose``. What was queued is still committed."""
        if self._closing is None:
            self._feed.close()
            self._closing = asyncio.create_task(self._close(), name="store-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self._writer.stop()
        await asyncio.to_thread(self._readers.shutdown, wait=True)
        for connection in self._reader_connections:
            connection.close()
        self._lock.release()

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        self._feed.check_open()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                return await loop.run_in_executor(self._readers, self._query, query)
        except TimeoutError as exc:
            raise self._too_slow(Unavailable, "STORE_UNAVAILABLE") from exc

    def _query(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Runs in a reader's thread, each with one connection of its own."""
        connection: sqlite3.Connection | None = getattr(self._reader, "connection", None)
        if connection is None:
            connection = self._reader.connection = open_reader(self._path)
            self._reader_connections.append(connection)
        try:
            return query(connection)
        except sqlite3.Error as exc:
            raise translate(exc, self._path) from exc

    async def _write(self, work: Callable[[Engine], T], *, weight: int = 0) -> T:
        self._feed.check_open()
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                async with self._admission:
                    if self._closing is not None:
                        raise store_closed()
                    return await self._writer.run(work, weight=weight)
        except TimeoutError as exc:
            raise self._too_slow(OutcomeUnknown, None) from exc

    def _too_slow(self, kind: type[HypervisorError], reason: str | None) -> HypervisorError:
        return kind(
            f"the disk of the store {self._path} did not answer in {self._config.request_timeout_s:g} s",
            reason=reason,
            metadata={"path": self._path},
            retry_after_s=1.0,
        )

    async def _watch(self, prefix: str, after_revision: int) -> AsyncGenerator[WatchBatch, None]:
        # The file and not the feed says what is newest: a reader may see a commit before the feed has it.
        await self._read(lambda connection: _check_watchable(connection, after_revision))
        async for batch in follow(self._feed, prefix, after_revision=after_revision, history=self._history):
            yield batch

    async def _history(self, prefix: str, after_revision: int) -> HistoryChunk:
        def read(connection: sqlite3.Connection) -> HistoryChunk:
            with snapshot(connection):
                return read_history(connection, prefix, after_revision)

        return await self._read(read)

    async def _expire_for_ever(self) -> None:
        """End leases whose time is up. Where the disk refuses, they cannot be renewed, and it tries on."""
        while True:
            now = self._clock.monotonic()
            deadline = self._timers.next_deadline()
            wait = _EXPIRY_TICK_S if deadline is None else max(0.0, deadline - now)
            await self._clock.sleep(min(wait, _EXPIRY_TICK_S))
            due = self._timers.take_due(self._clock.monotonic())
            for lease_id in due:
                try:
                    await self._end_lease(lease_id)
                except HypervisorError as exc:
                    log.error("lease_expiry_failed", lease_id=lease_id, reason=exc.reason, error=str(exc))
                    self._timers.retry([lease_id], at=self._clock.monotonic() + _EXPIRY_TICK_S)
                else:
                    log.info("lease_expired", lease_id=lease_id)

    async def _end_lease(self, lease_id: str) -> None:
        await self._write(lambda engine: engine.end_lease(lease_id))
        self._timers.remove(lease_id)

    async def _compact_for_ever(self) -> None:
        """Keep the history within its limits in revisions and in time."""
        while True:
            await self._clock.sleep(_HOUSEKEEPING_S)
            try:
                target = self._compaction_target(self._clock.monotonic())
                if target > 0:
                    await self.compact(target)
            except HypervisorError as exc:
                log.error("store_compaction_failed", reason=exc.reason, error=str(exc))

    def _compaction_target(self, now: float) -> int:
        """The revision to compact to. The samples say which revision was the newest when; bounded by time."""
        newest = self._feed.newest
        self._revision_samples.append((now, newest))
        target = newest - self._config.history_revisions
        while self._revision_samples and self._revision_samples[0][0] <= now - self._config.history_age_s:
            target = max(target, self._revision_samples.popleft()[1])
        return target


def _check_watchable(connection: sqlite3.Connection, after_revision: int) -> None:
    with snapshot(connection):
        check_position(connection, after_revision)
