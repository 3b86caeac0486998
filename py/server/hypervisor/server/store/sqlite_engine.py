"""Writing the database: commits, leases and compaction on the one writing connection.

Belongs to the writer's thread. Every method runs inside a transaction that the caller began; ``Engine``
keeps the counters of the store in memory and sets them back when the caller rolls back.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.store.sqlite_rows import POSITION_BITS, execute_in_bulk, read_items
from hypervisor.server.store.storage import (
    Change,
    Committed,
    Compare,
    Conflicted,
    Delete,
    Item,
    Lease,
    Operation,
    Put,
    WatchBatch,
)
from hypervisor.server.store.validation import lease_not_found

__all__ = ["Engine"]

_PURGE_REVISIONS = 200


@dataclass(frozen=True, slots=True)
class _Counters:
    revision: int
    compacted: int
    purged: int


class Engine:
    """The state machine of the store: requests in, results and watch batches out."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._counters = self._load()
        self._before = self._counters
        self._batches: list[WatchBatch] = []

    @property
    def revision(self) -> int:
        """The newest revision, that of the open transaction included."""
        return self._counters.revision

    @property
    def compacted(self) -> int:
        """History before this revision is forgotten."""
        return self._counters.compacted

    def begin(self) -> None:
        """Begin a transaction, which takes SQLite's write lock at once."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._before = self._counters
        self._batches = []

    def commit(self) -> Sequence[WatchBatch]:
        """Make the transaction durable; returns what it changed, one batch for each revision."""
        for name in ("revision", "compacted", "purged"):
            value = getattr(self._counters, name)
            if value != getattr(self._before, name):
                self._connection.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))
        self._connection.execute("COMMIT")
        return self._batches

    def rollback(self) -> None:
        """Undo the transaction. SQLite has done so already after some errors."""
        self._counters = self._before
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def apply(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> Committed | Conflicted:
        """See ``Storage.commit``. Raises before it writes anything, or not at all (but for errors of
        SQLite)."""
        current = read_items(self._connection, {*(c.key for c in compares), *(o.key for o in operations)})
        if any(_mod_revision(current.get(c.key)) != c.mod_revision for c in compares):
            return Conflicted(self._counters.revision, {c.key: current.get(c.key) for c in compares})
        for operation in operations:
            if (
                isinstance(operation, Put)
                and operation.lease_id
                and not self._lease_exists(operation.lease_id)
            ):
                raise lease_not_found(operation.lease_id)
        self._write(operations, current)
        return Committed(self._counters.revision)

    def grant(self, lease: Lease) -> None:
        """Record a new lease."""
        self._connection.execute("INSERT INTO leases VALUES (?, ?)", (lease.id, lease.ttl_s))

    def end_lease(self, lease_id: str) -> None:
        """Delete the lease and, in one revision, its keys; nothing happens when it does not exist."""
        rows = self._connection.execute(
            "SELECT key FROM kv WHERE lease_id = ? AND lease_id <> '' ORDER BY key", (lease_id,)
        ).fetchall()
        self._connection.execute("DELETE FROM leases WHERE id = ?", (lease_id,))
        keys = [key for (key,) in rows]
        self._write([Delete(key) for key in keys], read_items(self._connection, keys))

    def leases(self) -> Sequence[Lease]:
        """All leases, for their timers at start."""
        return [Lease(*row) for row in self._connection.execute("SELECT id, ttl_s FROM leases ORDER BY id")]

    def compact(self, revision: int) -> None:
        """See ``Storage.compact``. Forgets at once; ``purge`` frees the space afterwards, piece by piece."""
        counters = self._counters
        if revision > counters.revision:
            raise InvalidArgument.of_field(
                "revision", f"{revision} is newer than the store ({counters.revision})"
            )
        if revision > counters.compacted:
            self._counters = replace(counters, compacted=revision)

    def purge(self) -> bool:
        """Delete some of what compaction has forgotten; returns whether there is more to delete.

        A version is dead when a later one of its key, at or before the compacted revision, replaced it; so
        it is enough to walk the revisions compacted since the last time and delete what each of them
        replaced.
        """
        counters = self._counters
        until = min(counters.purged + _PURGE_REVISIONS, counters.compacted)
        rows = self._connection.execute(
            "SELECT id, key, value IS NULL FROM versions WHERE id >= ? AND id < ? ORDER BY id",
            ((counters.purged + 1) << POSITION_BITS, (until + 1) << POSITION_BITS),
        ).fetchall()
        for version_id, key, deletion in rows:
            # A deletion at the end of what is forgotten is itself superfluous: absent says the same.
            last = version_id + 1 if deletion else version_id
            self._connection.execute("DELETE FROM versions WHERE key = ? AND id < ?", (key, last))
        self._counters = replace(counters, purged=until)
        return until < counters.compacted

    def _write(self, operations: Sequence[Operation], current: Mapping[str, Item]) -> None:
        """Apply the operations in one revision; ``current`` has the living versions of their keys."""
        revision = self._counters.revision + 1
        changes: list[Change] = []
        versions: list[Any] = []
        living: list[Any] = []
        gone: list[Any] = []
        for operation in operations:
            key = operation.key
            previous = current.get(key)
            version_id = revision << POSITION_BITS | len(changes)
            if isinstance(operation, Delete):
                if previous is None:
                    continue
                item = None
                versions += (version_id, key, 0, "", None)
                gone.append(key)
            else:
                created = previous.create_revision if previous else revision
                item = Item(key, operation.value, created, revision, operation.lease_id)
                versions += (version_id, key, created, operation.lease_id, operation.value)
                living += (key, version_id, created, operation.lease_id)
            changes.append(Change(key, revision, item, previous))
        if changes:
            execute_in_bulk(self._connection, "INSERT INTO versions VALUES {}", versions, columns=5)
            execute_in_bulk(self._connection, "INSERT OR REPLACE INTO kv VALUES {}", living, columns=4)
            execute_in_bulk(self._connection, "DELETE FROM kv WHERE (key) IN (VALUES {})", gone, columns=1)
            self._counters = replace(self._counters, revision=revision)
            self._batches.append(WatchBatch(revision, tuple(changes)))

    def _lease_exists(self, lease_id: str) -> bool:
        row = self._connection.execute("SELECT 1 FROM leases WHERE id = ?", (lease_id,)).fetchone()
        return row is not None

    def _load(self) -> _Counters:
        rows: dict[str, int] = dict(self._connection.execute("SELECT name, value FROM meta"))
        return _Counters(rows["revision"], rows["compacted"], rows["purged"])


def _mod_revision(item: Item | None) -> int:
    return 0 if item is None else item.mod_revision
