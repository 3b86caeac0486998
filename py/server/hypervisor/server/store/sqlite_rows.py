"""Reading the database: keys, pages at a revision, history; and many rows in few statements. No threads here.

Every row that Python's sqlite3 fetches and every statement it runs gives the interpreter's lock away and has to get
it back from whatever else the process does, which can take milliseconds. So what is done for each commit takes few
statements, however much the commit has in it.
"""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from hypervisor.server.store.feed import HistoryChunk, compacted
from hypervisor.server.store.storage import Change, Item, Page, WatchBatch
from hypervisor.server.store.validation import prefix_end

__all__ = [
    "POSITION_BITS",
    "check_position",
    "execute_in_bulk",
    "read_history",
    "read_item",
    "read_items",
    "read_page",
    "read_revision",
    "snapshot",
]

POSITION_BITS = 20
"""``versions.id`` is ``revision << POSITION_BITS | position``: up to a million changes in one revision."""

_HISTORY_ROWS = 1000

_BULK_ROWS = (64, 32, 16, 8, 4, 3, 2, 1)
"""Rows of one statement: few sizes, so that sqlite3 finds every statement prepared."""

_Row = tuple[int, str, int, str, bytes | None]
_COLUMNS = "v.id, v.key, v.create_revision, v.lease_id, v.value"


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Have everything read inside come from one moment."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def read_revision(connection: sqlite3.Connection) -> int:
    """The newest revision committed."""
    return _meta(connection, "revision")


def read_item(connection: sqlite3.Connection, key: str) -> Item | None:
    """The living version of ``key``."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM kv JOIN versions v ON v.id = kv.id WHERE kv.key = ?", (key,)
    ).fetchone()
    return None if row is None else _item(row)


def read_items(connection: sqlite3.Connection, keys: Collection[str]) -> dict[str, Item]:
    """The living versions of ``keys``, of those that exist."""
    found: dict[str, Item] = {}
    wanted = tuple(keys)
    for begin, rows in _pieces(len(wanted)):
        for row in connection.execute(_reading(rows), wanted[begin : begin + rows]).fetchall():
            found[row[1]] = _item(row)
    return found


def execute_in_bulk(
    connection: sqlite3.Connection, statement: str, values: Sequence[Any], *, columns: int
) -> None:
    """Run ``statement`` over rows of ``columns`` values each; ``{}`` in it stands for the rows."""
    for begin, rows in _pieces(len(values) // columns):
        connection.execute(
            _writing(statement, rows, columns), values[begin * columns : (begin + rows) * columns]
        )


@lru_cache(maxsize=256)
def _pieces(count: int) -> tuple[tuple[int, int], ...]:
    """``count`` rows cut into pieces (begin, length) of the sizes that statements have."""
    pieces: list[tuple[int, int]] = []
    begin = 0
    for rows in _BULK_ROWS:
        while count - begin >= rows:
            pieces.append((begin, rows))
            begin += rows
    return tuple(pieces)


@cache
def _reading(rows: int) -> str:
    marks = ",".join("?" * rows)
    return f"SELECT {_COLUMNS} FROM kv CROSS JOIN versions v ON v.id = kv.id WHERE kv.key IN ({marks})"


@cache
def _writing(statement: str, rows: int, columns: int) -> str:
    row = f"({','.join('?' * columns)})"
    return statement.format(",".join([row] * rows))


def read_page(
    connection: sqlite3.Connection, prefix: str, *, start_key: str, limit: int, revision: int | None
) -> Page:
    """One page; see ``Storage.list``. Call it inside ``snapshot``."""
    newest = read_revision(connection) if revision is None else check_position(connection, revision)
    at = newest if revision is None else revision
    bounds = (start_key or prefix or "/", prefix_end(prefix))
    if at == newest:
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM kv JOIN versions v ON v.id = kv.id"
            " WHERE kv.key >= ? AND kv.key < CAST(? AS TEXT) ORDER BY kv.key LIMIT ?",
            (*bounds, limit + 1),
        )
    else:
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM versions v JOIN ("
            "  SELECT max(id) AS id FROM versions WHERE key >= ? AND key < CAST(? AS TEXT) AND id < ? GROUP BY key"
            ") newest ON v.id = newest.id WHERE v.value IS NOT NULL ORDER BY v.key LIMIT ?",
            (*bounds, (at + 1) << POSITION_BITS, limit + 1),
        )
    items = [_item(row) for row in rows]
    next_key = items.pop().key if len(items) > limit else ""
    return Page(tuple(items), at, next_key)


def read_history(connection: sqlite3.Connection, prefix: str, after_revision: int) -> HistoryChunk:
    """The changes of ``prefix`` directly after ``after_revision``, about a thousand, whole revisions only.

    Call it inside ``snapshot``. Raises ``Compacted``.
    """
    newest = check_position(connection, after_revision)
    low = (after_revision + 1) << POSITION_BITS
    rows = _changed_rows(connection, prefix, low, (newest + 1) << POSITION_BITS, limit=_HISTORY_ROWS)
    reached = newest
    if len(rows) == _HISTORY_ROWS:
        # The last revision may be cut off: leave it for the next chunk, or read all of it where it is the
        # only one.
        last = rows[-1][0] >> POSITION_BITS
        if rows[0][0] >> POSITION_BITS < last:
            rows = [row for row in rows if row[0] >> POSITION_BITS < last]
            reached = last - 1
        else:
            rows = _changed_rows(connection, prefix, low, (last + 1) << POSITION_BITS, limit=-1)
            reached = last
    batches: list[WatchBatch] = []
    changes: list[Change] = []
    for row in rows:
        revision = row[0] >> POSITION_BITS
        if changes and changes[-1].revision != revision:
            batches.append(WatchBatch(changes[-1].revision, tuple(changes)))
            changes = []
        item = None if row[4] is None else _item(row)
        changes.append(Change(row[1], revision, item, _version_before(connection, row[1], row[0])))
    if changes:
        batches.append(WatchBatch(changes[-1].revision, tuple(changes)))
    return HistoryChunk(tuple(batches), reached)


def _changed_rows(
    connection: sqlite3.Connection, prefix: str, low: int, high: int, *, limit: int
) -> list[_Row]:
    # The unary plus keeps SQLite from walking the index by key: the order wanted is that of the ids.
    return connection.execute(
        f"SELECT {_COLUMNS} FROM versions v WHERE v.id >= ? AND v.id < ? AND +v.key >= ? AND +v.key < CAST(? AS TEXT)"
        " ORDER BY v.id LIMIT ?",
        (low, high, prefix or "/", prefix_end(prefix), limit),
    ).fetchall()


def _version_before(connection: sqlite3.Connection, key: str, version_id: int) -> Item | None:
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM versions v WHERE v.key = ? AND v.id < ? ORDER BY v.id DESC LIMIT 1",
        (key, version_id),
    ).fetchone()
    return None if row is None or row[4] is None else _item(row)


def check_position(connection: sqlite3.Connection, revision: int) -> int:
    """Raise ``Compacted`` unless the history reaches to ``revision``; returns the newest revision."""
    newest = read_revision(connection)
    oldest = _meta(connection, "compacted")
    if not oldest <= revision <= newest:
        raise compacted(revision, oldest=oldest, newest=newest)
    return newest


def _meta(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0]
    return value


def _item(row: _Row) -> Item:
    value = row[4]
    if value is None:
        raise AssertionError(f"version {row[0]} is a deletion")
    return Item(row[1], value, row[2], row[0] >> POSITION_BITS, row[3])
