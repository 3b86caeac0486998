"""Durable commits a second through the store, beside the bare limit: sqlite3 itself, and a bare etcd client.

One commit is what a create does: one compare and two keys of 500 bytes; the large one has 32 puts, as concurrent
reservations have that share a transaction. ``single`` is one caller after another, the others are concurrent. The
references write the same bytes with the least that is durable: sqlite3 an upsert into one table with WAL and
synchronous=FULL, etcd a transaction without the token that settles lost answers.
"""

import asyncio
import itertools
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import structlog
import uvloop
from etcdserverpb import rpc_pb2 as pb
from etcdserverpb import rpc_pb2_grpc
from measure import Claim, Reference, claim, interleave, publish, unmeasured
from measure_etcd import running_etcd

from hypervisor.core.clock import SystemClock
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import ABSENT, Committed, Compare, Put, Storage

PAIRS = 5
VALUE = b"v" * 500
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Load:
    """How many commits, how many at once, and what is in each."""

    total: int
    concurrency: int
    puts: int
    compares: int


def _run(runner: asyncio.Runner, work: Callable[[], Coroutine[Any, Any, float]]) -> float:
    return runner.run(work())


def _keys(count: int) -> list[str]:
    """Keys that were never written."""
    return [f"/bench/{next(_serial):09d}" for _ in range(count)]


async def _many(work: Callable[[], Awaitable[None]], *, total: int, concurrency: int) -> float:
    """Await ``work`` ``total`` times, so many at once; returns times a second."""
    left = iter(range(total))

    async def worker() -> None:
        for _ in left:
            await work()

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return total / (time.perf_counter() - begin)


async def _store_rate(storage: Storage, load: Load) -> float:
    """Commits a second through the store; checks that every one was applied."""
    revisions: set[int] = set()

    async def commit() -> None:
        keys = _keys(load.puts)
        outcome = await storage.commit(
            [Compare(key, ABSENT) for key in keys[: load.compares]], [Put(key, VALUE) for key in keys]
        )
        if not isinstance(outcome, Committed):
            raise AssertionError(f"a commit of new keys conflicted: {outcome}")
        revisions.add(outcome.revision)

    rate = await _many(commit, total=load.total, concurrency=load.concurrency)
    if len(revisions) != load.total:
        raise AssertionError(f"{load.total} commits made {len(revisions)} revisions")
    return rate


def _raw_sqlite_rate(connection: sqlite3.Connection, *, commits: int, puts: int, group: int) -> float:
    """The same rows by sqlite3 alone, ``group`` commits in one transaction."""
    begin = time.perf_counter()
    for _ in range(commits // group):
        connection.execute("BEGIN IMMEDIATE")
        rows = [(key, VALUE) for key in _keys(puts * group)]
        connection.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?)", rows)
        connection.execute("COMMIT")
    elapsed = time.perf_counter() - begin
    newest = connection.execute("SELECT value FROM kv WHERE key = ?", (rows[-1][0],)).fetchone()
    if newest != (VALUE,):
        raise AssertionError("the last row is missing")
    return commits / elapsed


def sqlite_claims(runner: asyncio.Runner, directory: Path) -> list[Claim]:
    """The embedded store beside sqlite3."""
    config = StoreConfig(backend="sqlite", path=str(directory / "store.db"))
    storage = runner.run(open_storage(config, SystemClock()))
    claims = []
    with closing(sqlite3.connect(directory / "raw.db", isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA synchronous = FULL")
        raw.execute("CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB)")
        for name, concurrency, total, group, goal in (
            ("sqlite single", 1, 1000, 1, 0.5),
            ("sqlite, 64 callers", 64, 8000, 32, 0.3),
        ):
            mine, theirs = interleave(
                partial(_run, runner, partial(_store_rate, storage, Load(total, concurrency, 2, 1))),
                partial(_raw_sqlite_rate, raw, commits=total, puts=2, group=group),
                pairs=PAIRS,
            )
            claims.append(
                claim(
                    f"durable commits, {name}",
                    mine,
                    theirs,
                    unit="commits/s",
                    reference_name=f"sqlite3, {group} in a transaction",
                    better="more",
                    goal=goal,
                )
            )
    runner.run(storage.aclose())
    return claims


async def _bare_etcd_rate(stub: "rpc_pb2_grpc.KVAsyncStub", load: Load) -> float:
    """The same transactions by a bare client."""

    async def commit() -> None:
        keys = [key.encode() for key in _keys(load.puts)]
        request = pb.TxnRequest(
            compare=[
                pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=0)
                for key in keys[: load.compares]
            ],
            success=[pb.RequestOp(request_put=pb.PutRequest(key=key, value=VALUE)) for key in keys],
        )
        if not (await stub.Txn(request)).succeeded:
            raise AssertionError("a transaction of new keys conflicted")

    return await _many(commit, total=load.total, concurrency=load.concurrency)


def etcd_claims(runner: asyncio.Runner, directory: Path) -> list[Claim]:
    """The etcd store beside a bare client."""
    cases = (
        ("etcd single", 1, 400, 2, 1, 0.85),
        ("etcd, 16 callers", 16, 3000, 2, 1, 0.8),
        ("etcd, 16 callers of 32 puts", 16, 400, 32, 0, 0.8),
    )
    reference = "a bare client"
    binary = shutil.which("etcd")
    if binary is None:
        return [
            unmeasured(
                f"durable commits, {case[0]}",
                reference_name=reference,
                better="more",
                goal=case[-1],
                why="etcd is not installed",
                against=Reference.LIMIT,
            )
            for case in cases
        ]
    claims = []
    with running_etcd(binary, directory) as etcd:
        config = StoreConfig(backend="etcd", endpoints=(etcd.endpoint,), dial_timeout_s=30)
        storage = runner.run(open_storage(config, SystemClock()))
        channel = runner.run(_channel(etcd.endpoint))
        stub = rpc_pb2_grpc.KVStub(channel)
        for name, concurrency, total, puts, compares, goal in cases:
            load = Load(total, concurrency, puts, compares)
            mine, theirs = interleave(
                partial(_run, runner, partial(_store_rate, storage, load)),
                partial(_run, runner, partial(_bare_etcd_rate, stub, load)),
                pairs=PAIRS,
            )
            claims.append(
                claim(
                    f"durable commits, {name}",
                    mine,
                    theirs,
                    unit="commits/s",
                    reference_name=reference,
                    better="more",
                    goal=goal,
                )
            )
        runner.run(channel.close(None))
        runner.run(storage.aclose())
    return claims


async def _channel(endpoint: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(endpoint)


def main() -> None:
    """Measure and print."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with (
        tempfile.TemporaryDirectory(prefix="bench-store-") as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        publish([*sqlite_claims(runner, Path(directory)), *etcd_claims(runner, Path(directory))])


if __name__ == "__main__":
    main()
