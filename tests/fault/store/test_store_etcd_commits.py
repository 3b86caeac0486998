"""Commits to etcd whose answer or request is lost on the way: the outcome reported is the true one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sized
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
from etcdserverpb import rpc_pb2 as pb

from hvtest_etcd import EtcdServer, open_etcd
from hvtest_storage import apply, conflicted, count_is, eventually, read_watch, unique_root
from hvtest_tcp_proxy import TcpProxy
from hypervisor.core.errors import NotFound, Unavailable
from hypervisor.server.store.etcd import EtcdStorage
from hypervisor.server.store.etcd_commit import COMMIT_PREFIX
from hypervisor.server.store.storage import ABSENT, Committed, Compare, Item, OutcomeUnknown, Put, Storage


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One server for the tests that leave it alone."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
async def proxy(etcd: EtcdServer) -> AsyncIterator[TcpProxy]:
    """Between the store under test and etcd."""
    async with TcpProxy(etcd.port) as proxy:
        yield proxy


@pytest.fixture
async def storage(proxy: TcpProxy) -> AsyncIterator[EtcdStorage]:
    """The store under test."""
    storage = await open_etcd(proxy.endpoint)
    # A first commit, so that what follows meets a slot that is ready.
    await apply(storage, Put(unique_root() + "warm", b""))
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


async def _exists(storage: Storage, key: str) -> bool:
    return await storage.get(key) is not None


async def _changes_of_key(storage: Storage, key: str, *, after_revision: int) -> int:
    """How often ``key`` was changed, by a marker written behind it."""
    marker = key + "-marker"
    await apply(storage, Put(marker, b""))
    batches = await read_watch(
        storage,
        key,
        after_revision=after_revision,
        until=lambda b: bool(b) and b[-1].changes[-1].key == marker,
    )
    return sum(change.key == key for batch in batches for change in batch.changes)


async def test_lost_answer_of_an_applied_commit_is_reported_as_committed(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    key, value = root + "k", b"value-whose-answer-is-lost"
    proxy.hold_answers_after(value)
    committing = asyncio.create_task(storage.commit([Compare(key, ABSENT)], [Put(key, value)]))
    async with asyncio.timeout(10):
        await proxy.seen.wait()
    await eventually(lambda: _exists(direct, key))
    proxy.cut()
    outcome = await committing

    item = await direct.get(key)
    assert isinstance(outcome, Committed)
    assert item == Item(key, value, outcome.revision, outcome.revision)
    assert await _changes_of_key(direct, key, after_revision=start) == 1
    await apply(storage, Put(key, b"2"), compares=(Compare(key, outcome.revision),))


async def test_lost_answer_is_settled_although_somebody_changed_the_key_since(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    key, value = root + "k", b"value-that-is-overwritten"
    proxy.hold_answers_after(value)
    committing = asyncio.create_task(storage.commit([Compare(key, ABSENT)], [Put(key, value)]))
    await eventually(lambda: _exists(direct, key))
    applied = await direct.get(key)
    assert applied is not None
    await apply(direct, Put(key, b"of somebody else"))
    proxy.cut()

    assert await committing == Committed(applied.mod_revision)


async def test_lost_answer_on_a_silent_connection_is_settled_over_a_new_one(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    key, value = root + "k", b"value-on-a-silent-connection"
    proxy.hold_answers_after(value)
    outcome = await storage.commit([Compare(key, ABSENT)], [Put(key, value)])

    item = await direct.get(key)
    assert item is not None
    assert outcome == Committed(item.mod_revision)
    assert proxy.cuts == 0


async def test_lost_request_is_applied_once_in_the_end(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    start = await direct.current_revision()
    key, value = root + "k", b"value-that-never-arrives"
    proxy.cut_before(value)
    outcome = await storage.commit([Compare(key, ABSENT)], [Put(key, value)])

    assert proxy.seen.is_set()
    assert isinstance(outcome, Committed)
    assert await direct.get(key) == Item(key, value, outcome.revision, outcome.revision)
    assert await _changes_of_key(direct, key, after_revision=start) == 1


async def test_lost_answer_of_a_conflict_is_reported_as_conflict(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    key, value = root + "k", b"value-that-conflicts"
    revision = await apply(direct, Put(key, b"of somebody else"))
    proxy.hold_answers_after(value)
    committing = asyncio.create_task(storage.commit([Compare(key, ABSENT)], [Put(key, value)]))
    async with asyncio.timeout(10):
        await proxy.seen.wait()
    proxy.cut()

    assert conflicted(await committing).current == {key: Item(key, b"of somebody else", revision, revision)}


async def test_request_that_arrives_after_it_was_settled_changes_nothing(
    storage: EtcdStorage, direct: EtcdStorage, proxy: TcpProxy, root: str
) -> None:
    """The request hangs in the network past its deadline; the commit is sent again; then the first one arrives."""
    start = await direct.current_revision()
    key = root + "k"
    proxy.pause()
    outcome = await storage.commit([], [Put(key, b"sent twice, applied once")])
    proxy.resume()

    assert isinstance(outcome, Committed)
    assert await _changes_of_key(direct, key, after_revision=start) == 1


async def test_commit_without_any_way_to_read_back_is_outcome_unknown(tmp_path: Path, root: str) -> None:
    with EtcdServer(tmp_path / "etcd") as etcd:
        async with TcpProxy(etcd.port) as proxy:
            storage = await open_etcd(proxy.endpoint, request_timeout_s=1.0)
            await apply(storage, Put(root + "warm", b""))
            proxy.hold_answers_after(b"value-of-unknown-fate")
            committing = asyncio.create_task(storage.commit([], [Put(root + "k", b"value-of-unknown-fate")]))
            async with asyncio.timeout(10):
                await proxy.seen.wait()
            proxy.refuse()
            with pytest.raises(OutcomeUnknown):
                await committing

            proxy.accept()
            revision = await apply(storage, Put(root + "k", b"next"))
            item = await storage.get(root + "k")
            assert item is not None
            assert (item.value, item.mod_revision) == (b"next", revision)
            await storage.aclose()


async def test_commit_to_a_dead_etcd_is_unavailable_and_not_applied(tmp_path: Path, root: str) -> None:
    with EtcdServer(tmp_path / "etcd") as etcd:
        storage = await open_etcd(etcd.endpoint)
        await apply(storage, Put(root + "warm", b""))
        etcd.kill()
        # The first may meet the connection while it breaks, and be of unknown outcome; not the next.
        with contextlib.suppress(Unavailable, OutcomeUnknown):
            await storage.commit([], [Put(root + "first", b"")])
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable) as caught:
                await storage.commit([], [Put(root + "k", b"")])
        assert caught.value.reason == "STORE_UNAVAILABLE"
        assert etcd.endpoint in str(caught.value)
        assert caught.value.retry_after_s

        etcd.start()
        assert await storage.get(root + "k") is None
        await apply(storage, Put(root + "k", b"after the restart"))
        await storage.aclose()


async def test_slots_that_lost_their_lease_are_replaced(
    storage: EtcdStorage, direct: EtcdStorage, root: str
) -> None:
    """As after a pause of this process longer than the lease of its commit slots."""
    async with direct._members.connected() as member:
        slots = await member.kv.Range(
            pb.RangeRequest(key=COMMIT_PREFIX.encode(), range_end=COMMIT_PREFIX[:-1].encode() + b"0")
        )
        for lease in {kv.lease for kv in slots.kvs}:
            await member.lease.LeaseRevoke(pb.LeaseRevokeRequest(id=lease))
    lease_of_caller = await direct.grant_lease(60)

    await apply(storage, Put(root + "plain", b""))
    await apply(direct, Put(root + "bound", b"", lease_of_caller.id))
    ended = await direct.grant_lease(60)
    await direct.revoke_lease(ended.id)
    with pytest.raises(NotFound) as caught:
        await storage.commit([], [Put(root + "k", b"", ended.id)])
    assert caught.value.metadata["lease_id"] == ended.id


async def test_acknowledged_commits_survive_kill_and_restart(tmp_path: Path, root: str) -> None:
    """etcd is killed in the middle of many commits: each is applied exactly as often as was reported."""
    with EtcdServer(tmp_path / "etcd") as etcd:
        storage = await open_etcd(etcd.endpoint, request_timeout_s=8.0)
        start = await storage.current_revision()
        acknowledged: dict[str, int] = {}
        unknown: set[str] = set()
        refused: set[str] = set()
        numbers = iter(range(1500))

        async def write() -> None:
            for n in numbers:
                key = f"{root}{n:05d}"
                try:
                    outcome = await storage.commit([Compare(key, ABSENT)], [Put(key, b"")])
                except OutcomeUnknown:
                    unknown.add(key)
                except Unavailable:
                    refused.add(key)
                else:
                    assert isinstance(outcome, Committed)
                    acknowledged[key] = outcome.revision

        async def kill_and_restart() -> None:
            for target in (300, 800):
                await eventually(partial(_has_at_least, acknowledged, target))
                etcd.kill()
                await asyncio.to_thread(etcd.start)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(kill_and_restart())
            for _ in range(16):
                group.create_task(write())

        stored = {i.key: i.mod_revision for i in (await storage.list(root, limit=10_000)).items}
        assert len(acknowledged) > 800
        assert {k: r for k, r in stored.items() if k not in unknown} == acknowledged
        assert not refused & stored.keys()
        batches = await read_watch(storage, root, after_revision=start, until=count_is(len(stored)))
        assert [b.changes[0].key for b in batches] == sorted(stored, key=lambda k: stored[k])
        await storage.aclose()


async def test_commits_and_watches_go_on_over_the_endpoint_that_is_left(etcd: EtcdServer, root: str) -> None:
    async with TcpProxy(etcd.port) as one, TcpProxy(etcd.port) as two:
        storage = await open_etcd(one.endpoint, two.endpoint)
        start = await storage.current_revision()
        async with aclosing(storage.watch(root, after_revision=start)) as watch:
            for step, (dead, alive) in enumerate([(one, two), (two, one), (one, two)]):
                alive.accept()
                dead.refuse()
                async with asyncio.timeout(10):
                    revision = await apply(storage, Put(root + "k", b"%d" % step))
                    batch = await anext(watch)
                assert batch.revision == revision
        await storage.aclose()


async def _has_at_least(entries: Sized, count: int) -> bool:
    return len(entries) >= count
