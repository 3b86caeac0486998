"""The agent's journal for coroutines: an entry is on the disk before the action it announces begins.

Concurrent writes share syncs: whatever waits when the writer thread is free goes into one batch. The file itself, its
format and its recovery are in journal_file.py and journal_records.py.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import structlog

from hypervisor.agent.disk import Disk
from hypervisor.agent.entries import Entry
from hypervisor.agent.journal_file import JournalFile, Write
from hypervisor.agent.journal_records import Forget, Put
from hypervisor.core.errors import HypervisorError, Internal

__all__ = ["Journal"]

_LATER_S = 0.02
"""How long a write that nobody waits for may wait for company."""

_log = structlog.get_logger(__name__)


class Journal:
    """Durable memory of one agent. Open it with ``async with Journal(path) as journal``.

    Writes of one instance are applied in the order they are made. ``put`` and ``forget`` return when the record is
    on the disk and raise ResourceExhausted (``JOURNAL_FULL``) or Unavailable (``JOURNAL_FAILED``) when it is not.
    """

    def __init__(self, path: Path, *, disk: Disk | None = None) -> None:
        self._file = JournalFile(path, disk=disk or Disk())
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Write, Future[None]]] = deque()
        self._entries: dict[str, Entry] = {}
        self._epochs_gone: dict[str, int] = {}
        self._closed = False
        self._flush_due = False
        self._flush_later: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "Journal":
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._file.open)
        except BaseException:
            await self.aclose()
            raise
        self._entries = dict(self._file.entries)
        self._epochs_gone = dict(self._file.epochs_gone)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def starts(self) -> int:
        """How often an agent has started on this journal, this time included."""
        return self._file.starts

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the journal held when it was opened."""
        return self._entries

    @property
    def epochs_gone(self) -> Mapping[str, int]:
        """Epochs of the instances deleted last, as of the opening."""
        return self._epochs_gone

    async def put(self, entry: Entry, *, finishing: bool = False) -> None:
        """Record the entry. ``finishing`` ones free something and may use the space kept for that."""
        await self._write(Write(Put(entry), finishing))

    async def forget(self, instance_id: str, *, epoch: int) -> None:
        """Record that the instance is gone."""
        await self._write(Write(Forget(instance_id, epoch), finishing=True))

    def put_soon(self, entry: Entry) -> None:
        """Record the entry with the next sync, without waiting: for what recovery could find out by itself."""
        self._submit(Write(Put(entry), finishing=True), later=True).add_done_callback(_log_lost)

    def forget_soon(self, instance_id: str, *, epoch: int) -> None:
        """As :meth:`forget`, with the next sync, without waiting."""
        self._submit(Write(Forget(instance_id, epoch), finishing=True), later=True).add_done_callback(
            _log_lost
        )

    async def aclose(self) -> None:
        """Write what waits and close the file; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._flush_now()
        # Runs after every flush that was submitted; bounded by the disk's own time-outs.
        await asyncio.shield(asyncio.wrap_future(self._executor.submit(self._file.close)))
        self._executor.shutdown(wait=False)

    async def _write(self, write: Write) -> None:
        # Shielded: a caller that leaves must not take a record out of a batch that is being written.
        await asyncio.shield(asyncio.wrap_future(self._submit(write)))

    def _submit(self, write: Write, *, later: bool = False) -> Future[None]:
        """Queue the write. What is queued in one turn of the loop goes into one batch; a later write waits for
        one that cannot, or a little while."""
        if self._closed:
            raise Internal("the journal is closed")
        future: Future[None] = Future()
        with self._lock:
            self._waiting.append((write, future))
        loop = asyncio.get_running_loop()
        if not later and not self._flush_due:
            self._flush_due = True
            loop.call_soon(self._flush_on_time)
        elif later and not self._flush_due and self._flush_later is None:
            self._flush_later = loop.call_later(_LATER_S, self._flush_on_time)
        return future

    def _flush_on_time(self) -> None:
        if not self._closed:  # Else the closing has flushed.
            self._flush_now()

    def _flush_now(self) -> None:
        self._flush_due = False
        if self._flush_later is not None:
            self._flush_later.cancel()
            self._flush_later = None
        if self._waiting:
            self._executor.submit(self._flush)

    def _flush(self) -> None:
        """Write all that waits as one batch; finds nothing when an earlier flush took it along."""
        with self._lock:
            batch = list(self._waiting)
            self._waiting.clear()
        if not batch:
            return
        try:
            results = self._file.append([write for write, _ in batch])
        except Exception as exc:
            # A defect of ours: no waiter may hang, and none may take its record for written.
            _log.exception("journal_defect")
            results = [Internal(f"the journal failed: {exc}")] * len(batch)
        for (_, future), failure in zip(batch, results, strict=True):
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)


def _log_lost(future: Future[None]) -> None:
    failure = future.exception()
    if isinstance(failure, HypervisorError):
        _log.warning("journal_record_lost", reason=failure.reason, error=failure.message)
