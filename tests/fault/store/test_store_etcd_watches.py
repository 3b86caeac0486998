"""Watches on etcd while connections break: nothing lost, nothing twice, and a gap is said to be one."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from hvtest_etcd import EtcdServer, open_etcd
from hvtest_storage import apply, changes_of, unique_root
from hvtest_tcp_proxy import TcpProxy
from hypervisor.server.store.etcd import EtcdStorage
from hypervisor.server.store.storage import Compacted, Delete, Put, WatchBatch


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One server for the tests that leave it alone."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
async def proxy(etcd: EtcdServer) -> AsyncIterator[TcpProxy]:
    """Between the watch under test and etcd."""
    async with TcpProxy(etcd.port) as proxy:
        yield proxy


@pytest.fixture
async def storage(proxy: TcpProxy) -> AsyncIterator[EtcdStorage]:
    """The store under test."""
    storage = await open_etcd(proxy.endpoint)
    yield storage
    await storage.aclose()


@pytest.fixture
async def direct(etcd: EtcdServer) -> AsyncIterator[EtcdStorage]:
    """Somebody else, with a connection that works."""
    storage = await open_etcd(etcd.endpoint)
    yield storage
    await storage.aclose()


@pytest.fixture
def root() -> str:
    """A prefix of the test's own."""
    return unique_root()


async def _fill(storage: EtcdStorage, root: str, count: int) -> list[int]:
    """Commits of three keys each, one after the other; their revisions."""
    return [
        await apply(storage, *(Put(f"{root}{n:05d}/{k}", b"x" * 200) for k in range(3))) for n in range(count)
    ]


async def _fill_fast(storage: EtcdStorage, root: str, count: int) -> set[int]:
    revisions: set[int] = set()
    numbers = iter(range(count))

    async def write() -> None:
        for n in numbers:
            operations = [Put(f"{root}{n:05d}/{k}", b"x" * 200) for k in range(3)]
            revisions.add(await apply(storage, *operations))

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(write())
    return revisions


async def test_connection_cut_in_the_middle_of_a_catch_up_loses_and_repeats_nothing(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    revisions = await _fill_fast(direct, root, 3000)
    batches: list[WatchBatch] = []
    # A response of etcd's catch-up holds up to a thousand revisions, here about a megabyte: cut within and between.
    proxy.cut_after_answers(1_000, 100_000, 900_000, 400_000, 1_500_000)

    async with asyncio.timeout(60), aclosing(storage.watch(root, after_revision=start)) as watch:
        async for batch in watch:
            batches.append(batch)
            if len(batches) == len(revisions):
                break

    assert proxy.cuts >= 4
    assert [b.revision for b in batches] == sorted(revisions)
    assert all(len(b.changes) == 3 for b in batches)
    assert len({c.key for c in changes_of(batches)}) == 9000


async def test_cuts_between_live_changes_lose_and_repeat_nothing(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    written: list[int] = []
    # Fewer on the way than lie between two cuts: after each cut the watch has to connect again to see the next one.
    room = asyncio.Semaphore(15)

    async def write() -> None:
        for n in range(300):
            await room.acquire()
            written.append(await apply(direct, *(Put(f"{root}{n:05d}/{k}", b"x" * 200) for k in range(3))))

    seen: list[int] = []
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(write())
        async with aclosing(storage.watch(root, after_revision=start)) as watch:
            async for batch in watch:
                seen.append(batch.revision)
                room.release()
                assert len(batch.changes) == 3
                if len(seen) % 25 == 10:
                    proxy.cut()
                if len(seen) == 300:
                    break

    assert proxy.cuts == 12
    assert seen == written


async def test_compaction_while_disconnected_is_told(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    async with aclosing(storage.watch(root, after_revision=start)) as watch:
        await apply(direct, Put(root + "k", b"1"))
        await anext(watch)
        proxy.refuse()
        await apply(direct, Delete(root + "k"))
        await direct.compact(await apply(direct, Put(root + "k", b"3")))
        proxy.accept()

        with pytest.raises(Compacted):
            async with asyncio.timeout(20):
                await anext(watch)


async def test_compaction_up_to_what_was_delivered_disturbs_nobody(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    async with asyncio.timeout(30), aclosing(storage.watch(root, after_revision=start)) as watch:
        revision = await apply(direct, Put(root + "k", b"1"))
        assert (await anext(watch)).revision == revision
        proxy.refuse()
        await direct.compact(revision)
        deleted = await apply(direct, Delete(root + "k"))
        proxy.accept()
        batch = await anext(watch)

    assert batch.revision == deleted
    assert batch.changes[0].previous is not None


async def test_silent_connection_is_noticed_and_replaced(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    async with asyncio.timeout(30), aclosing(storage.watch(root, after_revision=start)) as watch:
        await apply(direct, Put(root + "k", b"1"))
        await anext(watch)
        accepted = proxy.accepted
        proxy.pause()
        revision = await apply(direct, Put(root + "k", b"2"))
        batch = await anext(watch)

    assert batch.revision == revision
    assert proxy.accepted > accepted
    assert proxy.cuts == 0


async def test_quiet_watch_on_a_sound_connection_is_left_alone(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    async with aclosing(storage.watch(root, after_revision=start)) as watch:
        await apply(direct, Put(root + "k", b"1"))
        await anext(watch)
        accepted = proxy.accepted
        waiting = asyncio.ensure_future(anext(watch))
        # Longer than silence is borne: the signs of life that were asked for have kept the connection.
        await asyncio.wait({waiting}, timeout=5.0)
        assert not waiting.done()
        revision = await apply(direct, Put(root + "k", b"2"))
        async with asyncio.timeout(5):
            assert (await waiting).revision == revision

    assert proxy.accepted == accepted


async def test_watch_and_lease_survive_kill_and_restart_of_etcd(tmp_path: Path, root: str) -> None:
    with EtcdServer(tmp_path / "etcd") as etcd:
        storage = await open_etcd(etcd.endpoint)
        lease = await storage.grant_lease(30)
        start = await storage.current_revision()
        seen: list[int] = []
        written: list[int] = []
        async with asyncio.timeout(60), aclosing(storage.watch(root, after_revision=start)) as watch:
            for round_number in range(2):
                written.append(await apply(storage, Put(f"{root}{round_number}/before", b"", lease.id)))
                seen.append((await anext(watch)).revision)
                etcd.kill()
                await asyncio.to_thread(etcd.start)
                written.append(await apply(storage, Put(f"{root}{round_number}/after", b"")))
                seen.append((await anext(watch)).revision)
            assert await storage.keep_alive(lease.id) == lease.ttl_s

        assert seen == written
        assert len((await storage.list(root)).items) == 4
        await storage.aclose()


async def test_store_restored_from_an_older_backup_is_told(tmp_path: Path, root: str) -> None:
    """An etcd that is younger than the watch's position: waiting for it to catch up would skip its history."""
    with EtcdServer(tmp_path / "first") as first:
        async with TcpProxy(first.port) as proxy:
            storage = await open_etcd(proxy.endpoint)
            for n in range(20):
                last = await apply(storage, Put(f"{root}{n}", b""))
            async with aclosing(storage.watch(root, after_revision=last - 1)) as watch:
                await anext(watch)
                with EtcdServer(tmp_path / "second") as second:
                    proxy.redirect(second.port)
                    proxy.cut()
                    with pytest.raises(Compacted):
                        async with asyncio.timeout(20):
                            await anext(watch)
            await storage.aclose()
