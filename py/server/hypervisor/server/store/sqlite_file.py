"""Opening the database file: the lock that keeps a second server out, the settings, the schema."""

import fcntl
import os
import sqlite3
from pathlib import Path

from hypervisor.core.errors import FailedPrecondition
from hypervisor.server.store.sqlite_errors import translate

__all__ = ["FileLock", "open_reader", "open_writer"]

_APPLICATION_ID = 0x48795673
_SCHEMA_VERSION = 1

# One row per version of a key; `id` is revision << 20 | position in the commit, so the rows are in the order
# of the changes. A row with a NULL value is a deletion. `kv` points at the living version of each key:
# compares and leases are looked up there without touching a value.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    create_revision INTEGER NOT NULL,
    lease_id TEXT NOT NULL,
    value BLOB
);
CREATE UNIQUE INDEX versions_by_key ON versions (key, id);
CREATE TABLE kv (
    key TEXT PRIMARY KEY,
    id INTEGER NOT NULL,
    create_revision INTEGER NOT NULL,
    lease_id TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX kv_by_lease ON kv (lease_id, key) WHERE lease_id <> '';
CREATE TABLE leases (id TEXT PRIMARY KEY, ttl_s REAL NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('revision', 0), ('compacted', 0), ('purged', 0);
"""


class FileLock:
    """An advisory lock on ``<path>.lock``, held until ``release`` or the end of the process, however it
    ends."""

    def __init__(self, path: str) -> None:
        self._path = f"{path}.lock"
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock; raise ``FailedPrecondition`` (``STORE_LOCKED``) naming the holder when it is
        taken."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise FailedPrecondition(
                f"the lock file {self._path} cannot be opened ({exc.strerror}): check that the directory exists "
                "and that this user may write there",
                reason="STORE_CANNOT_OPEN",
                metadata={"path": self._path},
            ) from exc
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise FailedPrecondition(
                f"the store is in use by process {holder} (lock file {self._path}): one SQLite store serves one "
                "server; end that process, or use etcd for several servers",
                reason="STORE_LOCKED",
                metadata={"path": self._path, "pid": holder},
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held. The file stays: removing it would race."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def open_writer(path: str, *, max_bytes: int) -> sqlite3.Connection:
    """The one writing connection. Creates file and schema where there is none.

    WAL with synchronous=FULL: a commit that returned is on the disk. Raises ``FailedPrecondition`` for a
    file that is not ours, from a newer version, damaged or not writable.
    """
    try:
        Path(path).touch(mode=0o600, exist_ok=True)
    except OSError as exc:
        raise FailedPrecondition(
            f"the store {path} cannot be written ({exc.strerror}): check the owner and mode of the file and its "
            "directory",
            reason="STORE_READ_ONLY",
            metadata={"path": path},
        ) from exc
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
    except sqlite3.Error as exc:
        raise translate(exc, path) from exc
    try:
        # First of all: setting the journal mode would already change somebody else's file.
        empty = _check_ours(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -65536")
        if empty:
            connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID};"
                f"PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
            )
        # A write that changes nothing finds a read-only file system now and not at the first commit.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE meta SET value = value WHERE name = 'revision'")
        connection.execute("COMMIT")
        if max_bytes:
            page_size = connection.execute("PRAGMA page_size").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page_size)}")
    except sqlite3.Error as exc:
        connection.close()
        raise translate(exc, path) from exc
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: str) -> sqlite3.Connection:
    """A connection that sees what is committed and cannot write. Use it from one thread at a time."""
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA cache_size = -32768")
    except sqlite3.Error as exc:
        raise translate(exc, path) from exc
    return connection


def _check_ours(connection: sqlite3.Connection, path: str) -> bool:
    """Whether the file is new and empty; raises unless it is that or a store of ours, without changing it."""
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application_id == 0 and version == 0:
        if tables:
            raise _foreign(path, "it holds another program's tables")
        return True
    if application_id != _APPLICATION_ID:
        raise _foreign(path, f"its application id is {application_id:#x}")
    if version > _SCHEMA_VERSION:
        raise FailedPrecondition(
            f"the store {path} has format {version}, this program knows up to {_SCHEMA_VERSION}: use the newer "
            "program that wrote it",
            reason="STORE_FORMAT_TOO_NEW",
            metadata={"path": path, "format": str(version)},
        )
    return False


def _foreign(path: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} is not a store of this program ({why}): choose another store.path",
        reason="STORE_NOT_OURS",
        metadata={"path": path},
    )
