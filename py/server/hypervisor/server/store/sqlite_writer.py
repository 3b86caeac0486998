"""The thread that writes: requests that queue up while the disk is busy share one transaction.

Each request of a group is decided by itself, in order, on what those before it left: it has its own
compares, its own revision, its own answer. They share only the wait for the disk, which is what limits a
durable store. An answer is given after the group's COMMIT returned. When the group fails as a whole (disk
full), it is rolled back and its requests are run again one at a time, so that each gets its own true answer.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from hypervisor.core.errors import HypervisorError, Internal
from hypervisor.server.store.sqlite_engine import Engine
from hypervisor.server.store.sqlite_errors import translate
from hypervisor.server.store.storage import WatchBatch

__all__ = ["SqliteWriter"]

T = TypeVar("T")

_GROUP_REQUESTS = 256
_GROUP_BYTES = 8_000_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    run: Callable[[Engine], Any]
    weight: int
    answer: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    request: _Request
    result: Any
    error: Exception | None


class SqliteWriter:
    """Runs functions on the engine in its own thread, grouped into transactions, and answers on the event
    loop.

    ``publish`` is called on the loop with the batches of each transaction, in order, before its requests are
    answered: who waits for a commit and then looks at the feed finds it there. ``stop`` runs what is queued.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        engine: Engine,
        path: str,
        *,
        publish: Callable[[Sequence[WatchBatch]], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._path = path
        self._publish = publish
        self._loop = loop
        # Bounded by the storage's semaphore: it admits a limited number of requests at a time.
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._stopped = loop.create_future()
        self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def run(self, work: Callable[[Engine], T], *, weight: int = 0) -> T:
        """Have ``work`` run in the next transaction; returns its result once that is durable.

        ``weight`` is about how many bytes it writes. ``work`` may raise errors of ours only before it writes.
        Cancelling the caller does not stop ``work``.
        """
        request = _Request(work, weight, self._loop.create_future())
        self._queue.put(request)
        result: T = await request.answer
        return result

    async def stop(self) -> None:
        """Finish what is queued, close the connection, end the thread. Call it once."""
        self._queue.put(None)
        await self._stopped
        self._thread.join()

    def _main(self) -> None:
        try:
            while True:
                group, last = self._next_group()
                if group:
                    self._execute(group)
                if last:
                    return
        finally:
            try:
                self._connection.close()
            except sqlite3.Error:
                log.exception("store_close_failed", path=self._path)
            self._loop.call_soon_threadsafe(self._stopped.set_result, None)

    def _next_group(self) -> tuple[list[_Request], bool]:
        """Wait for one request, take those behind it along; true when the end of all requests was found."""
        group: list[_Request] = []
        weight = 0
        while len(group) < _GROUP_REQUESTS and weight < _GROUP_BYTES:
            try:
                request = self._queue.get(block=not group)
            except queue.Empty:
                break
            if request is None:
                return group, True
            group.append(request)
            weight += request.weight
        return group, False

    def _execute(self, group: Sequence[_Request]) -> None:
        try:
            outcomes, batches = self._transaction(group)
        except Exception as exc:
            # The boundary of the thread: whatever went wrong belongs to the callers, and the thread goes on.
            if len(group) > 1:
                log.warning("store_group_failed", path=self._path, requests=len(group), error=repr(exc))
                for request in group:
                    self._execute([request])
                return
            outcomes, batches = [_Outcome(group[0], None, self._translate(exc))], []
        self._loop.call_soon_threadsafe(self._deliver, outcomes, batches)

    def _transaction(self, group: Sequence[_Request]) -> tuple[list[_Outcome], Sequence[WatchBatch]]:
        engine = self._engine
        outcomes: list[_Outcome] = []
        committing = False
        engine.begin()
        try:
            for request in group:
                try:
                    outcomes.append(_Outcome(request, request.run(engine), None))
                except HypervisorError as exc:
                    outcomes.append(_Outcome(request, None, exc))
            committing = True
            return outcomes, engine.commit()
        except sqlite3.Error as exc:
            engine.rollback()
            raise translate(exc, self._path, committing=committing) from exc
        except BaseException:
            engine.rollback()
            raise

    def _translate(self, exc: Exception) -> Exception:
        if isinstance(exc, HypervisorError):
            return exc
        if isinstance(exc, sqlite3.Error):
            return translate(exc, self._path)
        log.error("store_request_failed", path=self._path, exc_info=exc)
        error = Internal(f"unexpected error of the store {self._path}: {exc!r}", reason="STORE_INTERNAL")
        error.__cause__ = exc
        return error

    def _deliver(self, outcomes: Sequence[_Outcome], batches: Sequence[WatchBatch]) -> None:
        if batches:
            self._publish(batches)
        for outcome in outcomes:
            answer = outcome.request.answer
            if answer.done():
                continue
            if outcome.error is None:
                answer.set_result(outcome.result)
            else:
                answer.set_exception(outcome.error)
