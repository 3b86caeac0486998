"""The journal on disk: appends batches, replays at the start, compacts itself. Blocking; one thread at a time.

Space is allocated ahead of the records, so that a full disk is met before an action and not in the middle of it, and a
part of it (``RESERVE_BYTES``) is kept for records that finish something: deleting works on a full disk. After a failed
write or sync what the file holds is unknown; it is then written anew from memory before it is used again.
"""

import errno
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from hypervisor.agent.disk import Disk
from hypervisor.agent.entries import Entry
from hypervisor.agent.journal_records import HEADER, Forget, Put, Record, Started, frame, replay
from hypervisor.core.errors import HypervisorError, ResourceExhausted, Unavailable

__all__ = ["TOMBSTONES", "JournalFile", "Write"]

CHUNK_BYTES = 256 << 10
RESERVE_BYTES = 64 << 10
_COMPACT_FROM_BYTES = 1 << 20
TOMBSTONES = 4096
"""Of how many deleted instances the epoch is remembered."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Write:
    """One record to append. ``finishing`` ones may use the reserve."""

    record: Record
    finishing: bool = False


class JournalFile:
    """See the module's docstring. The open file owns one descriptor; :meth:`close` gives it back."""

    def __init__(self, path: Path, *, disk: Disk) -> None:
        self._path = path
        self._disk = disk
        self._fd = -1
        self._end = 0
        self._allocated = 0
        self._suspect = False
        self._compact_at = _COMPACT_FROM_BYTES
        self._live: dict[str, bytes] = {}
        self._gone: OrderedDict[str, bytes] = OrderedDict()
        self._started = Started(0)
        self.entries: dict[str, Entry] = {}
        self.epochs_gone: dict[str, int] = {}

    @property
    def starts(self) -> int:
        """How often an agent has started on this journal, this time included."""
        return self._started.count

    def open(self) -> None:
        """Read what is there and count this start. Works on a full disk."""
        try:
            self._fd = self._disk.open(self._path)
            data = self._disk.read(self._fd)
            if not data:
                self._rewrite()
            else:
                self._load(data)
        except OSError as exc:
            raise self._failure(exc) from exc
        failed = self.append([Write(Started(self._started.count + 1), finishing=True)])[0]
        if failed is not None:
            raise failed

    def _load(self, data: bytes) -> None:
        found = replay(data, path=str(self._path))
        for record in found.records:
            self._apply(record, frame(record))
        self._end = found.end
        self._allocated = len(data)
        if found.torn_bytes:
            # Bytes of a write that never was acknowledged; what is appended must not be followed by them.
            _log.warning("journal_tail_torn", path=str(self._path), bytes=found.torn_bytes)
            self._disk.write(self._fd, bytes(len(data) - found.end), found.end)
            self._disk.sync(self._fd)

    def append(self, writes: Sequence[Write]) -> list[HypervisorError | None]:
        """Append and sync the batch; for each write None, or why it is not in the journal.

        A batch costs one sync. ResourceExhausted (``JOURNAL_FULL``), Unavailable (``JOURNAL_FAILED``).
        """
        results: list[HypervisorError | None] = [None] * len(writes)
        try:
            self._repair()
        except OSError as exc:
            return [self._failure(exc)] * len(writes)
        accepted: list[tuple[Record, bytes]] = []
        size = 0
        for index, write in enumerate(writes):
            framed = frame(write.record)
            try:
                self._make_room(size + len(framed), finishing=write.finishing)
            except OSError as exc:
                results[index] = self._failure(exc)
                continue
            accepted.append((write.record, framed))
            size += len(framed)
        if accepted:
            try:
                self._disk.write(self._fd, b"".join(framed for _, framed in accepted), self._end)
                self._disk.sync(self._fd)
            except OSError as exc:
                self._suspect = True
                failure = self._failure(exc)
                return [failure if result is None else result for result in results]
            self._end += size
            for record, framed in accepted:
                self._apply(record, framed)
            self._compact_if_worth_it()
        return results

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    def _apply(self, record: Record, framed: bytes) -> None:
        match record:
            case Started():
                self._started = record
            case Put(entry=entry):
                self.entries[entry.instance_id] = entry
                self._live[entry.instance_id] = framed
            case Forget(instance_id=instance_id, epoch=epoch):
                self.entries.pop(instance_id, None)
                self._live.pop(instance_id, None)
                self._gone[instance_id] = framed
                self._gone.move_to_end(instance_id)
                self.epochs_gone[instance_id] = epoch
                while len(self._gone) > TOMBSTONES:
                    oldest, _ = self._gone.popitem(last=False)
                    del self.epochs_gone[oldest]

    def _make_room(self, size: int, *, finishing: bool) -> None:
        needed = self._end + size
        if needed + RESERVE_BYTES <= self._allocated:
            return
        length = max(CHUNK_BYTES, needed + RESERVE_BYTES - self._allocated)
        try:
            self._disk.allocate(self._fd, self._allocated, length)
            self._disk.sync(self._fd)
        except OSError:
            if finishing and needed <= self._allocated:
                return
            raise
        self._allocated += length

    def _repair(self) -> None:
        if self._suspect:
            self._rewrite()
            _log.warning("journal_rewritten", path=str(self._path))

    def _compact_if_worth_it(self) -> None:
        if self._end < self._compact_at:
            return
        live = sum(map(len, self._live.values())) + sum(map(len, self._gone.values()))
        if self._end < 2 * live:
            self._compact_at = max(_COMPACT_FROM_BYTES, 2 * live)
            return
        try:
            self._rewrite()
        except OSError as exc:
            self._compact_at = 2 * self._end
            _log.warning("journal_compaction_failed", path=str(self._path), error=str(exc))
        else:
            self._compact_at = max(_COMPACT_FROM_BYTES, 2 * self._end)

    def _rewrite(self) -> None:
        """Put a new file with what is known in the place of the old one."""
        content = b"".join([HEADER, frame(self._started), *self._gone.values(), *self._live.values()])
        fresh = self._path.with_name(self._path.name + ".new")
        self._disk.remove(fresh)
        fd = self._disk.open(fresh)
        try:
            allocated = len(content) + RESERVE_BYTES + CHUNK_BYTES
            self._disk.allocate(fd, 0, allocated)
            self._disk.write(fd, content, 0)
            self._disk.sync(fd)
            self._disk.replace(fresh, self._path)
        except OSError:
            self._disk.close(fd)
            self._disk.remove(fresh)
            raise
        self.close()
        self._fd = fd
        self._end = len(content)
        self._allocated = allocated
        # From here on the new file is the journal; until its name is durable it counts as not written.
        self._suspect = True
        self._disk.sync_directory(self._path.parent)
        self._suspect = False

    def _failure(self, exc: OSError) -> HypervisorError:
        if exc.errno in _FULL:
            return ResourceExhausted(
                f"the agent's journal {self._path} cannot grow: {exc.strerror}. Free space on its file system; "
                "nothing was begun",
                reason="JOURNAL_FULL",
                metadata={"path": str(self._path)},
            )
        return Unavailable(
            f"the agent's journal {self._path} cannot be written: {exc.strerror or exc}. Look at the node's disk; "
            "nothing was begun",
            reason="JOURNAL_FAILED",
            metadata={"path": str(self._path)},
            retry_after_s=5.0,
        )
