"""The SQLite store when its process is killed, its disk is full, its file is damaged or belongs to somebody else."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from hvtest_storage import apply, count_is, eventually, read_watch
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound, ResourceExhausted
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.sqlite import SqliteStorage
from hypervisor.server.store.storage import ABSENT, Committed, Compacted, Compare, Delete, Put


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The database file."""
    return tmp_path / "store.db"


class SteppedClock(SystemClock):
    """The machine's clock, put forward by hand."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.offset_s

    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.01))


@asynccontextmanager
async def opened(
    path: Path, *, clock: SystemClock | None = None, **settings: float
) -> AsyncIterator[SqliteStorage]:
    """A store, closed at the end."""
    config = StoreConfig(path=str(path), **settings)  # type: ignore[arg-type]
    storage = await SqliteStorage.open(config, clock=clock or SystemClock())
    try:
        yield storage
    finally:
        await storage.aclose()


async def _refused(path: Path, reason: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        await SqliteStorage.open(StoreConfig(path=str(path)), clock=SystemClock())
    assert caught.value.reason == reason
    assert str(path) in str(caught.value)
    return caught.value


def _kill_after(lines: int, path: Path, *, first: int) -> list[tuple[int, int]]:
    """Run the writer, kill it while it writes, return what it had acknowledged."""
    with subprocess.Popen(
        [sys.executable, "-m", "hvtest_store_writer", str(path), str(first)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        acknowledged = []
        try:
            for line in process.stdout:
                if line.startswith("committed ") and line.endswith("\n"):
                    _, number, revision = line.split()
                    acknowledged.append((int(number), int(revision)))
                    if len(acknowledged) == lines:
                        process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    return acknowledged


async def test_everything_acknowledged_survives_kill_in_the_middle_of_writing(path: Path) -> None:
    acknowledged: dict[int, int] = {}
    # The second run begins on what the first left.
    for first, lines in ((0, 150), (10_000, 400)):
        acknowledged.update(_kill_after(lines, path, first=first))

    async with opened(path) as storage:
        revision = await storage.current_revision()
        items = {i.key: i for i in (await storage.list("/n/", limit=10_000)).items}
        total = await storage.get("/total")
        batches = await read_watch(storage, "", after_revision=0, until=count_is(revision))
    assert total is not None
    assert int(total.value) == revision
    assert total.mod_revision == revision
    for number, acknowledged_revision in acknowledged.items():
        one, two = items[f"/n/{number}/a"], items[f"/n/{number}/b"]
        assert one.mod_revision == two.mod_revision == acknowledged_revision
        assert one.value == two.value == b"%d " % number * 200
    for item in items.values():
        twin = items[item.key[:-1] + ("b" if item.key.endswith("a") else "a")]
        assert (twin.mod_revision, twin.value) == (item.mod_revision, item.value)
    assert [b.revision for b in batches] == list(range(1, revision + 1))
    assert all(len(b.changes) == 3 for b in batches)


async def test_second_process_is_kept_out_and_told_who_is_in(path: Path) -> None:
    script = "import sys, asyncio, hvtest_store_writer as w; asyncio.run(w.main(sys.argv[1], 0))"
    async with opened(path):
        result = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", script, str(path)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        error = await _refused(path, "STORE_LOCKED")

    assert result.returncode == 1
    assert f"in use by process {os.getpid()}" in result.stderr
    assert error.metadata["pid"] == str(os.getpid())
    assert f"{path}.lock" in str(error)
    async with opened(path) as storage:
        assert await storage.current_revision() == 0


async def test_full_disk_refuses_commits_and_recovers_when_there_is_room(path: Path) -> None:
    async with opened(path, max_bytes=2_000_000) as storage:
        await apply(storage, Put("/kept", b"1"))
        with pytest.raises(ResourceExhausted) as caught:
            await _fill(storage)
        revision = await storage.current_revision()
        written = revision - 1

        assert caught.value.reason == "STORE_DISK_FULL"
        assert str(path) in str(caught.value)
        assert 3 < written < 10
        page = await storage.list("/")
        assert [i.key for i in page.items] == [f"/big/{n}" for n in range(written)] + ["/count", "/kept"]
        assert next(i.value for i in page.items if i.key == "/count") == b"%d" % (written - 1)

        await storage.commit([], [Delete("/big/0"), Delete("/big/1")])
        await storage.compact(await storage.current_revision())
        await apply(storage, Put("/big/again", b"x" * 300_000))
        batches = await read_watch(
            storage, "/", after_revision=await storage.current_revision() - 1, until=count_is(1)
        )
        assert batches[0].changes[0].key == "/big/again"


async def test_commit_that_does_not_fit_fails_alone(path: Path) -> None:
    """Of many commits that share a transaction, the disk refuses some: the others are applied."""
    async with opened(path, max_bytes=2_000_000) as storage:
        small = [storage.commit([], [Put(f"/small/{n:03d}", b"x" * 100)]) for n in range(50)]
        large = [storage.commit([], [Put(f"/large/{n}", b"x" * 900_000)]) for n in range(4)]
        outcomes = await asyncio.gather(*small[:25], *large, *small[25:], return_exceptions=True)

        applied = {o.revision for o in outcomes if isinstance(o, Committed)}
        refused = [o for o in outcomes if isinstance(o, BaseException)]
        assert all(isinstance(o, ResourceExhausted) for o in refused)
        assert 1 <= len(refused) <= 4
        items = (await storage.list("/")).items
        assert {i.mod_revision for i in items} == applied
        assert len([i for i in items if i.key.startswith("/small/")]) == 50
        assert sorted(applied) == list(range(1, len(applied) + 1))


async def _fill(storage: SqliteStorage) -> None:
    for n in range(100):
        await apply(storage, Put(f"/big/{n}", b"x" * 300_000), Put("/count", b"%d" % n))


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"this is no database" * 100), "STORE_CORRUPT"),
        (lambda path: _run(path, "CREATE TABLE theirs (x)"), "STORE_NOT_OURS"),
        (lambda path: _run(path, "PRAGMA application_id = 7; CREATE TABLE theirs (x)"), "STORE_NOT_OURS"),
        (lambda path: path.mkdir(), "STORE_CANNOT_OPEN"),
    ],
    ids=["garbage", "tables of others", "application of others", "directory"],
)
async def test_file_that_is_no_store_is_refused_and_left_alone(
    path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(path)
    before = _content(path)
    await _refused(path, reason)

    assert _content(path) == before


async def test_missing_directory_is_named(tmp_path: Path) -> None:
    await _refused(tmp_path / "missing" / "store.db", "STORE_CANNOT_OPEN")


async def test_store_of_a_newer_version_is_refused(path: Path) -> None:
    async with opened(path):
        pass
    _run(path, "PRAGMA user_version = 99")

    error = await _refused(path, "STORE_FORMAT_TOO_NEW")
    assert error.metadata["format"] == "99"


async def test_damaged_page_is_told_and_nothing_is_written(path: Path) -> None:
    async with opened(path) as storage:
        for n in range(300):
            await apply(storage, Put(f"/k/{n:03d}", b"x" * 2000))
    _run(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        # Everything behind the schema and the meta table.
        file.seek(8 * 4096)
        file.write(b"\xa5" * (size - 8 * 4096))

    # Reading the leases at start may meet the damage already.
    with pytest.raises(FailedPrecondition) as caught:
        async with opened(path) as storage:
            await storage.list("/", limit=10_000)
    assert caught.value.reason == "STORE_CORRUPT"


async def test_store_survives_close_and_reopen_with_history(path: Path) -> None:
    async with opened(path) as storage:
        for n in range(20):
            await apply(storage, Put(f"/k/{n % 4}", b"%d" % n))
        await storage.compact(5)
        before = await storage.list("/")
        past = await storage.list("/", revision=10)

    async with opened(path) as storage:
        assert await storage.list("/") == before
        assert await storage.list("/", revision=10) == past
        batches = await read_watch(storage, "/k/", after_revision=12, until=count_is(8))
        assert [b.revision for b in batches] == list(range(13, 21))
        assert [b.changes[0].previous.value for b in batches if b.changes[0].previous] == [
            b"%d" % n for n in range(8, 16)
        ]
        async with aclosing(storage.watch("/", after_revision=4)) as watch:
            with pytest.raises(Compacted):
                await anext(watch)
        assert await apply(storage, Put("/k/new", b"")) == 21


async def test_restart_gives_every_lease_a_whole_time_to_live(path: Path) -> None:
    clock = SteppedClock()
    async with opened(path, clock=clock) as storage:
        lease = await storage.grant_lease(100)
        ended = await storage.grant_lease(100)
        await apply(storage, Put("/bound", b"", lease.id), Put("/ended", b"", ended.id))
        await storage.revoke_lease(ended.id)
        clock.offset_s += 99

    clock.offset_s += 1000
    async with opened(path, clock=clock) as storage:
        clock.offset_s += 99
        assert await storage.keep_alive(lease.id) == 100
        with pytest.raises(NotFound):
            await storage.keep_alive(ended.id)
        clock.offset_s += 99
        assert [i.key for i in (await storage.list("/")).items] == ["/bound"]
        clock.offset_s += 2

        async def gone() -> bool:
            return await storage.get("/bound") is None

        await eventually(gone)


async def test_history_is_kept_within_its_limits_by_itself(path: Path) -> None:
    clock = SteppedClock()
    async with opened(path, clock=clock, history_revisions=50, history_age_s=600) as storage:
        for n in range(200):
            await apply(storage, Put(f"/k/{n % 10}", b"%d" % n))

        async def is_compacted_to(revision: int) -> bool:
            try:
                await storage.list("/", revision=revision - 1)
            except Compacted:
                return True
            return False

        await eventually(lambda: is_compacted_to(150))
        assert len((await storage.list("/", revision=150)).items) == 10
        assert [
            b.revision for b in await read_watch(storage, "/", after_revision=150, until=count_is(50))
        ] == [*range(151, 201)]
        clock.offset_s += 700
        await eventually(lambda: is_compacted_to(200))
        assert [i.value for i in (await storage.list("/")).items] == [b"%d" % n for n in range(190, 200)]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM versions").fetchone() == (10,)
    connection.close()


async def test_purge_interrupted_by_a_kill_goes_on_later(path: Path) -> None:
    async with opened(path) as storage:
        for n in range(30):
            await apply(storage, Put("/k", b"%d" % n), Put("/other", b"%d" % n))
        await apply(storage, Delete("/other"))
    # As if killed between the compaction and its purge.
    _run(path, "UPDATE meta SET value = 31 WHERE name = 'compacted'")

    async with opened(path) as storage:
        await storage.compact(31)
        assert [i.value for i in (await storage.list("/")).items] == [b"29"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM versions").fetchone() == (1,)
    connection.close()


async def test_close_finishes_what_was_begun(path: Path) -> None:
    storage = await SqliteStorage.open(StoreConfig(path=str(path)), clock=SystemClock())
    commits = [
        asyncio.create_task(storage.commit([Compare(f"/k/{n}", ABSENT)], [Put(f"/k/{n}", b"")]))
        for n in range(100)
    ]
    await asyncio.sleep(0)
    await storage.aclose()
    outcomes = await asyncio.gather(*commits, return_exceptions=True)

    async with opened(path) as storage:
        stored = {i.mod_revision for i in (await storage.list("/", limit=1000)).items}
    assert {o.revision for o in outcomes if isinstance(o, Committed)} == stored
    assert all(isinstance(o, Committed | HypervisorError) for o in outcomes)


def _run(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
