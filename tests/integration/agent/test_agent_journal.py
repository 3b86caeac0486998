"""The journal on a real file system: what was acknowledged survives any crash, a full disk is told in time."""

import asyncio
import errno
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvtest_agent_waiting import until
from hypervisor.agent.data_directory import DataDirectory
from hypervisor.agent.disk import Disk
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.journal import Journal
from hypervisor.agent.journal_records import Put, Started, frame, replay
from hypervisor.core.errors import FailedPrecondition, ResourceExhausted, Unavailable
from hypervisor.core.ids import is_id, new_id

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _entry(instance_id: str, *, phase: Phase = Phase.READY, pad: int = 0) -> Entry:
    return Entry(
        instance_id=instance_id,
        driver="fake",
        generation=1,
        epoch=1,
        phase=phase,
        since=NOW,
        handle={"pad": "x" * pad} if pad else {},
    )


class FailingDisk(Disk):
    """Fails the named operation with the error while it is set."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.syncs = 0

    def _fail(self, operation: str) -> None:
        if operation in self.failing:
            raise OSError(self.failing[operation], "injected")

    def allocate(self, fd: int, offset: int, length: int) -> None:
        self._fail("allocate")
        super().allocate(fd, offset, length)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if "torn" in self.failing:
            super().write(fd, data[: len(data) // 2], offset)
            raise OSError(self.failing["torn"], "injected")
        self._fail("write")
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        self._fail("sync")
        self.syncs += 1
        super().sync(fd)

    def replace(self, source: Path, target: Path) -> None:
        self._fail("replace")
        super().replace(source, target)


async def _kept(path: Path) -> dict[str, Entry]:
    async with Journal(path) as journal:
        return dict(journal.entries)


async def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        await journal.put(_entry("a", phase=Phase.STARTING))
        await journal.put(_entry("b"))
        await journal.put(_entry("a"))
        await journal.forget("b", epoch=7)

    async with Journal(path) as journal:
        assert dict(journal.entries) == {"a": _entry("a")}
        assert dict(journal.epochs_gone) == {"b": 7}


async def test_records_that_nobody_waited_for_are_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        journal.put_soon(_entry("a"))
        journal.put_soon(_entry("b"))
        journal.forget_soon("a", epoch=1)

    assert await _kept(path) == {"b": _entry("b")}


async def test_starts_are_counted(tmp_path: Path) -> None:
    counts = []
    for _ in range(3):
        async with Journal(tmp_path / "journal") as journal:
            counts.append(journal.starts)

    assert counts == [1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 40, 3))
async def test_a_torn_tail_is_dropped_and_what_follows_is_kept(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        await journal.put(_entry("whole"))
    data = path.read_bytes()
    end = replay(data, path="journal").end
    torn = frame(Put(_entry("torn")))[:-cut]
    path.write_bytes(data[:end] + torn + data[end + len(torn) :])

    async with Journal(path) as journal:
        assert set(journal.entries) == {"whole"}
        await journal.put(_entry("later"))

    assert set(await _kept(path)) == {"whole", "later"}


async def test_a_damaged_record_ends_the_journal_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        await journal.put(_entry("first"))
        await journal.put(_entry("second"))
    data = bytearray(path.read_bytes())
    position = data.index(b"second")
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))

    assert set(await _kept(path)) == {"first"}


async def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"something else")

    with pytest.raises(FailedPrecondition) as caught:
        await _kept(path)

    assert caught.value.reason == "JOURNAL_UNREADABLE"
    assert path.read_bytes() == b"something else"


async def test_a_full_disk_refuses_new_actions_but_lets_old_ones_finish(tmp_path: Path) -> None:
    path, disk = tmp_path / "journal", FailingDisk()
    async with Journal(path, disk=disk) as journal:
        disk.failing["allocate"] = errno.ENOSPC
        kept = []

        async def fill() -> None:
            for number in range(10_000):
                await journal.put(_entry(f"i-{number}", pad=2000))
                kept.append(f"i-{number}")

        with pytest.raises(ResourceExhausted) as caught:
            await fill()

        assert caught.value.reason == "JOURNAL_FULL"
        assert kept
        await journal.put(_entry(kept[0], phase=Phase.DELETING), finishing=True)
        await journal.forget(kept[0], epoch=1)
        with pytest.raises(ResourceExhausted):
            await journal.put(_entry("another", pad=2000))

    assert set(await _kept(path)) == set(kept[1:])


async def test_a_restart_works_on_a_full_disk(tmp_path: Path) -> None:
    path, disk = tmp_path / "journal", FailingDisk()
    async with Journal(path) as journal:
        await journal.put(_entry("a"))
    disk.failing["allocate"] = errno.ENOSPC

    async with Journal(path, disk=disk) as journal:
        assert set(journal.entries) == {"a"}
        assert journal.starts == 2


async def test_the_journal_takes_entries_again_once_there_is_space(tmp_path: Path) -> None:
    path, disk = tmp_path / "journal", FailingDisk()
    async with Journal(path, disk=disk) as journal:
        disk.failing["allocate"] = errno.ENOSPC
        with pytest.raises(ResourceExhausted):
            await journal.put(_entry("large", pad=1 << 20))
        disk.failing.clear()

        await journal.put(_entry("large", pad=1 << 20))

    assert set(await _kept(path)) == {"large"}


@pytest.mark.parametrize("operation", ["write", "sync", "torn"])
async def test_a_failed_write_is_told_and_the_journal_heals_itself(tmp_path: Path, operation: str) -> None:
    path, disk = tmp_path / "journal", FailingDisk()
    async with Journal(path, disk=disk) as journal:
        await journal.put(_entry("before"))
        disk.failing[operation] = errno.EIO
        with pytest.raises(Unavailable) as caught:
            await journal.put(_entry("failed"))
        assert caught.value.reason == "JOURNAL_FAILED"
        disk.failing.clear()

        await journal.put(_entry("after"))

    assert set(await _kept(path)) == {"before", "after"}


async def test_old_records_are_compacted_away(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        for number in range(200):
            await journal.put(_entry("a", pad=20_000))
            await journal.put(_entry(f"b-{number % 5}"))

    assert path.stat().st_size < 2 << 20
    assert set(await _kept(path)) == {"a", *(f"b-{n}" for n in range(5))}


async def test_a_compaction_that_fails_loses_nothing(tmp_path: Path) -> None:
    path, disk = tmp_path / "journal", FailingDisk()
    disk.failing["replace"] = errno.EIO
    async with Journal(path) as journal:
        await journal.put(_entry("old"))
    async with Journal(path, disk=disk) as journal:
        for _ in range(100):
            await journal.put(_entry("a", pad=20_000))

    assert set(await _kept(path)) == {"old", "a"}
    assert os.listdir(tmp_path) == ["journal"]


async def test_concurrent_entries_share_syncs(tmp_path: Path) -> None:
    disk = FailingDisk()
    async with Journal(tmp_path / "journal", disk=disk) as journal:
        before = disk.syncs

        await asyncio.gather(*(journal.put(_entry(f"i-{n}")) for n in range(100)))

        assert disk.syncs - before < 10
    assert len(await _kept(tmp_path / "journal")) == 100


async def test_a_caller_that_leaves_does_not_take_its_record_along(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        putting = asyncio.ensure_future(journal.put(_entry("a")))
        await asyncio.sleep(0)
        putting.cancel()
        await asyncio.wait({putting})

    assert set(await _kept(path)) == {"a"}


_LIMITED = """
import asyncio, resource, sys
from datetime import UTC, datetime
from pathlib import Path
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.journal import Journal
from hypervisor.core.errors import ResourceExhausted

async def main(path):
    async with Journal(path) as journal:
        limit = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        count = 0
        try:
            while True:
                await journal.put(Entry(instance_id=f"i-{count}", driver="fake", generation=1, epoch=1,
                    phase=Phase.READY, since=datetime.now(UTC), handle={"pad": "x" * 500}))
                count += 1
        except ResourceExhausted as exc:
            await journal.forget("i-0", epoch=1)
            print(exc.reason, count)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_file_that_the_system_does_not_let_grow_is_a_full_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"

    answer = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _LIMITED, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    reason, count = answer.stdout.split()
    assert reason == "JOURNAL_FULL"
    assert int(count) > 100
    assert len(await _kept(path)) == int(count) - 1


_ENDLESS = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.journal import Journal

async def main(path):
    async with Journal(path) as journal:
        count = 0
        while True:
            await journal.put(Entry(instance_id=f"i-{count}", driver="fake", generation=1, epoch=1,
                phase=Phase.READY, since=datetime.now(UTC)))
            count += 1
            print(count, flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _ENDLESS, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        acknowledged = 0
        async with asyncio.timeout(30):
            while acknowledged < 300:
                acknowledged = int(await process.stdout.readline())
    finally:
        process.kill()
        rest, _ = await process.communicate()
    acknowledged = max([acknowledged, *(int(line) for line in rest.split(b"\n")[:-1] if line)])

    kept = await _kept(path)

    assert {f"i-{n}" for n in range(acknowledged)} <= set(kept)


async def test_a_data_directory_is_for_one_agent(tmp_path: Path) -> None:
    async with DataDirectory(tmp_path / "data"):
        with pytest.raises(FailedPrecondition) as caught:
            async with DataDirectory(tmp_path / "data"):
                raise AssertionError("a second agent got in")

    assert caught.value.reason == "DATA_DIR_IN_USE"
    async with DataDirectory(tmp_path / "data"):
        pass


async def test_the_node_id_is_made_once(tmp_path: Path) -> None:
    async with DataDirectory(tmp_path / "data") as data:
        first = await data.node_id(new_id)
    async with DataDirectory(tmp_path / "data") as data:
        second = await data.node_id(new_id)

    assert is_id(first, "n")
    assert second == first


async def test_a_damaged_node_id_is_told_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "node_id").write_text("garbage\n")
    async with DataDirectory(tmp_path) as data:
        with pytest.raises(FailedPrecondition) as caught:
            await data.node_id(new_id)

    assert caught.value.reason == "NODE_ID_UNREADABLE"
    assert (tmp_path / "node_id").read_text() == "garbage\n"


async def test_flushes_happen_without_company_too(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with Journal(path) as journal:
        journal.put_soon(_entry("alone"))

        await until(
            lambda: Put(_entry("alone")) in replay(path.read_bytes(), path="journal").records,
            what="the record is written by itself",
        )
    assert Started(1) in replay(path.read_bytes(), path="journal").records
