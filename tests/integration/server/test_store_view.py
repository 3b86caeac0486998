"""The view of the cluster: consistent, complete, in order, and honest about what it cannot know."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime

import pytest

from hvtest_control_plane import until
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import Internal, Unavailable
from hypervisor.core.model import Instance, InstanceSpec, OperationRecord, encode
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType
from hypervisor.server import keys
from hypervisor.server.cluster_state import Update
from hypervisor.server.services import ClusterChange, Kind, Versioned
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import (
    Committed,
    Compacted,
    Delete,
    Operation,
    Put,
    Storage,
    WatchBatch,
)
from hypervisor.server.view import StoreView, ViewSettings

NOW = datetime(2030, 1, 1, tzinfo=UTC)
FAST = ViewSettings(
    verify_interval_s=0.05, relist_interval_s=3600, lag_timeout_s=0.3, retry_s=0.02, progress_interval_s=0.1
)


def instance(number: int, *, status: InstanceStatus = InstanceStatus.RUNNING) -> Instance:
    return Instance(
        id=f"i-{number}",
        name=f"name-{number}",
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(),
        status=status,
        desired=DesiredState.RUNNING,
        created_at=NOW,
        updated_at=NOW,
        node_id="n-1",
    )


def put(number: int, *, status: InstanceStatus = InstanceStatus.RUNNING) -> Put:
    made = instance(number, status=status)
    return Put(keys.instance(made.id).path, encode(made))


def gone(number: int) -> Delete:
    return Delete(keys.instance(f"i-{number}").path)


async def commit(storage: Storage, *operations: Operation) -> int:
    outcome = await storage.commit([], operations)
    assert isinstance(outcome, Committed)
    return outcome.revision


@asynccontextmanager
async def viewing(storage: Storage, settings: ViewSettings = FAST) -> AsyncIterator[StoreView]:
    view = StoreView(storage, SystemClock(), settings=settings)
    running = asyncio.create_task(view.run())
    try:
        await asyncio.wait_for(view.loaded(), 5)
        yield view
        assert not running.done() or running.exception() is None
    finally:
        running.cancel()
        await asyncio.wait({running})


async def take(
    changes: AsyncGenerator[tuple[ClusterChange, ...], None], count: int
) -> list[tuple[int, str, bool]]:
    """The next changes: revision, object id, whether it exists after it."""
    found: list[tuple[int, str, bool]] = []
    async with asyncio.timeout(10), aclosing(changes):
        async for together in changes:
            found += [(c.revision, c.object_id, c.current is not None) for c in together]
            if len(found) >= count:
                break
    return found


async def test_it_shows_what_was_there_before_and_what_comes(storage: Storage) -> None:
    await commit(storage, put(1))
    async with viewing(storage) as view:
        assert view.instance_named("default", "name-1") == view.instance("i-1")
        assert [i.value.id for i in view.instances_on("n-1")] == ["i-1"]

        revision = await commit(storage, put(2), gone(1))
        await view.wait_revision(revision)

        assert [i.value.id for i in view.instances()] == ["i-2"]
        assert view.instance_named("default", "name-1") is None
        found = view.instance("i-2")
        assert found is not None
        assert found.revision == revision == view.revision
        assert not view.stale


async def test_changes_come_in_order_together_by_revision_and_once_for_every_consumer(
    storage: Storage,
) -> None:
    async with viewing(storage) as view:
        start = view.revision
        consumers = [asyncio.create_task(take(view.changes(after_revision=start), 149)) for _ in range(3)]
        revisions = [await commit(storage, put(2 * n), put(2 * n + 1), gone(2 * n - 2)) for n in range(1, 51)]

        seen = [await consumer for consumer in consumers]

        assert seen[0] == seen[1] == seen[2]
        assert sorted({revision for revision, _, _ in seen[0]}) == revisions
        assert [r for r, _, _ in seen[0]] == sorted(r for r, _, _ in seen[0])
        later = await take(view.changes(after_revision=revisions[24]), 75)
        assert later == [s for s in seen[0] if s[0] > revisions[24]]


async def test_the_last_change_of_a_revision_is_marked(storage: Storage) -> None:
    async with viewing(storage) as view:
        start = view.revision
        await commit(storage, put(1), put(2), Put("/hypervisor/other", b"{}"))
        async with asyncio.timeout(5), aclosing(view.changes(after_revision=start)) as changes:
            together = await anext(changes)

        assert [c.last_of_revision for c in together] == [False, True]
        assert {c.kind for c in together} == {Kind.INSTANCE}


async def test_consumers_beyond_the_memory_are_served_from_history(storage: Storage) -> None:
    small = ViewSettings(keep_changes=10, verify_interval_s=0.05)
    first_revision = await commit(storage, put(0))
    for n in range(1, 20):
        await commit(storage, put(n))
    async with viewing(storage, small) as view:
        slow = view.changes(after_revision=None)
        first = asyncio.ensure_future(anext(slow))
        await asyncio.sleep(0)
        for n in range(20, 120):
            await commit(storage, put(n))
        await view.wait_revision(await storage.current_revision())

        from_start = await take(view.changes(after_revision=first_revision), 119)
        assert [o for _, o, _ in from_start] == [f"i-{n}" for n in range(1, 120)]
        begun = await first
        rest = await take(slow, 99)
        assert [c.object_id for c in begun] + [o for _, o, _ in rest] == [f"i-{n}" for n in range(20, 120)]


async def test_silence_is_told_as_progress(storage: Storage) -> None:
    async with (
        viewing(storage) as view,
        asyncio.timeout(5),
        aclosing(view.changes(after_revision=None)) as changes,
    ):
        assert await anext(changes) == ()


async def test_history_that_is_gone_is_told_as_compacted(storage: Storage) -> None:
    for n in range(10):
        await commit(storage, put(n))
    await storage.compact(8)
    async with viewing(storage) as view:
        with pytest.raises(Compacted):
            await take(view.changes(after_revision=3), 1)


async def test_a_revision_of_another_store_is_told_as_compacted(storage: Storage) -> None:
    async with viewing(storage) as view:
        with pytest.raises(Compacted):
            await take(view.changes(after_revision=10_000), 1)


async def test_own_commits_are_seen_at_once_and_once(storage: Storage) -> None:
    async with viewing(storage) as view:
        start = await commit(storage, put(0))
        await view.wait_revision(start)
        revision = await commit(storage, put(1))
        view.offer(revision, [Update(keys.instance("i-1").path, Versioned(instance(1), revision))])
        assert view.instance("i-1") is not None

        await commit(storage, put(2))
        assert await take(view.changes(after_revision=start), 2) == [
            (revision, "i-1", True),
            (revision + 1, "i-2", True),
        ]


async def test_an_offer_that_would_leave_a_gap_is_left_to_the_watch(storage: Storage) -> None:
    async with viewing(storage) as view:
        view.offer(view.revision + 2, [Update(keys.instance("i-9").path, Versioned(instance(9), 2))])
        assert view.instance("i-9") is None


async def test_offers_in_the_other_order_are_taken_once_nothing_is_missing(storage: Storage) -> None:
    async with viewing(storage) as view:
        first = view.revision + 1
        view.offer(first + 1, [Update(keys.instance("i-2").path, Versioned(instance(2), first + 1))])
        assert view.instance("i-2") is None

        view.offer(first, [Update(keys.instance("i-1").path, Versioned(instance(1), first))])

        assert view.revision == first + 1
        assert view.instance("i-1") == Versioned(instance(1), first)
        assert view.instance("i-2") == Versioned(instance(2), first + 1)


async def test_a_record_that_cannot_be_read_does_not_blind_the_view(storage: Storage) -> None:
    async with viewing(storage) as view:
        await commit(storage, Put(keys.instance("i-1").path, b"{broken"))
        await view.wait_revision(await commit(storage, put(2)))

        assert [i.value.id for i in view.instances()] == ["i-2"]
        with pytest.raises(Internal) as unreadable:
            view.find(keys.instance("i-1"))
        assert unreadable.value.reason == "RECORD_UNREADABLE"

        await view.wait_revision(await commit(storage, put(1)))
        assert view.find(keys.instance("i-1")) == view.instance("i-1")


async def test_waiting_for_a_revision_that_does_not_come_ends(storage: Storage) -> None:
    async with viewing(storage, ViewSettings(wait_timeout_s=0.05)) as view:
        with pytest.raises(Unavailable) as behind:
            await view.wait_revision(view.revision + 1)
        assert behind.value.reason == "VIEW_BEHIND"


async def test_the_newest_operation_of_a_request_is_found(storage: Storage) -> None:
    def operation(number: int) -> Put:
        record = OperationRecord(
            id=f"op-{number}",
            verb="create",
            object_kind="instance",
            object_id="i-1",
            object_name="web",
            principal=f"p{number}",
            started_at=NOW.replace(second=number),
            request_id="r-1",
        )
        return Put(keys.operation(record.id).path, encode(record))

    async with viewing(storage) as view:
        await view.wait_revision(await commit(storage, operation(2), operation(1)))
        found = view.operation_of_request("r-1")
        assert found is not None
        assert found.value.id == "op-2"


class FaultyWatch(MemoryStorage):
    """A store whose watch loses events, goes silent, or loses its place, as etcd's have."""

    lose: frozenset[int] = frozenset()
    silent = False
    compacted_once = False
    watches = 0

    async def watch(
        self, prefix: str, *, after_revision: int, with_previous: bool = True
    ) -> AsyncGenerator[WatchBatch, None]:
        self.watches += 1
        silent = self.silent
        watch = super().watch(prefix, after_revision=after_revision, with_previous=with_previous)
        async with aclosing(watch) as batches:
            async for batch in batches:
                if silent:
                    await asyncio.Event().wait()
                if self.compacted_once:
                    self.compacted_once = False
                    raise Compacted("gone")
                if batch.revision not in self.lose:
                    yield batch


@pytest.fixture
async def faulty() -> AsyncIterator[FaultyWatch]:
    opened = FaultyWatch(SystemClock())
    yield opened
    await opened.aclose()


async def test_events_that_the_watch_lost_are_repaired(faulty: FaultyWatch) -> None:
    faulty.lose = frozenset({2, 3, 4})
    await commit(faulty, put(1))
    async with viewing(faulty, ViewSettings(verify_interval_s=0.02, relist_interval_s=0.1)) as view:
        consumer = asyncio.create_task(take(view.changes(after_revision=None), 4))
        await asyncio.sleep(0)
        await commit(faulty, put(2))
        await commit(faulty, gone(1))
        await commit(faulty, put(3), put(2, status=InstanceStatus.STOPPED))
        await commit(faulty, put(4))

        await until(lambda: view.instance("i-3") is not None and view.instance("i-1") is None)

        seen = {(object_id, exists) for _, object_id, exists in await consumer}
        assert seen == {("i-4", True), ("i-2", True), ("i-3", True), ("i-1", False)}
        found = view.instance("i-2")
        assert found is not None
        assert (found.value.status, found.revision) == (InstanceStatus.STOPPED, 4)
        assert view.repairs > 0


async def test_to_catch_up_is_to_have_what_the_store_holds(faulty: FaultyWatch) -> None:
    async with viewing(faulty) as view:
        await commit(faulty, put(1))

        await view.catch_up()

        assert view.instance("i-1") is not None
        assert view.repairs == 0
        assert not await view.catch_up()


async def test_a_repair_does_not_undo_what_came_meanwhile(faulty: FaultyWatch) -> None:
    async with viewing(faulty, ViewSettings(verify_interval_s=0.001, relist_interval_s=0.001)) as view:
        for n in range(200):
            await commit(faulty, put(n % 7))
            revision = await commit(faulty, gone(n % 7)) if n % 3 else await faulty.current_revision()
            await view.wait_revision(revision)
            held = {i.value.id for i in view.instances()}
            listed = {i.key.rpartition("/")[2] for i in (await faulty.list(keys.PREFIX)).items}
            assert held == listed


async def test_a_watch_that_went_silent_is_begun_anew_and_nothing_is_left_out(faulty: FaultyWatch) -> None:
    faulty.silent = True
    async with viewing(faulty) as view:
        await until(lambda: faulty.watches == 1)
        faulty.silent = False
        start = view.revision
        for n in range(3):
            await commit(faulty, put(1, status=list(InstanceStatus)[n]))

        changes = await take(view.changes(after_revision=start), 3)

        assert [r for r, _, _ in changes] == [1, 2, 3]
        assert faulty.watches > 1


async def test_a_watch_that_stays_silent_is_replaced_by_comparing(faulty: FaultyWatch) -> None:
    faulty.silent = True
    async with viewing(faulty) as view:
        await commit(faulty, put(1))

        await until(lambda: view.instance("i-1") is not None)
        assert view.revision == 1


async def test_a_view_whose_place_is_compacted_lists_again(faulty: FaultyWatch) -> None:
    await commit(faulty, put(1))
    async with viewing(faulty) as view:
        faulty.compacted_once = True
        consumer = asyncio.create_task(take(view.changes(after_revision=None), 2))
        await asyncio.sleep(0)
        await commit(faulty, put(2), gone(1))

        assert {(o, exists) for _, o, exists in await consumer} == {("i-2", True), ("i-1", False)}
        assert [i.value.id for i in view.instances()] == ["i-2"]


async def test_who_follows_gets_every_change_even_those_the_view_listed_over(faulty: FaultyWatch) -> None:
    await commit(faulty, put(1))
    async with viewing(faulty) as view:
        faulty.compacted_once = True
        consumer = asyncio.create_task(take(view.changes(after_revision=None), 3))
        await asyncio.sleep(0)
        await commit(faulty, put(2))
        await commit(faulty, gone(2))
        await commit(faulty, put(3))

        assert await consumer == [(2, "i-2", True), (3, "i-2", False), (4, "i-3", True)]


async def test_who_follows_is_told_when_the_changes_the_view_listed_over_are_gone(
    faulty: FaultyWatch,
) -> None:
    await commit(faulty, put(1))
    async with viewing(faulty) as view:
        faulty.compacted_once = True
        consumer = asyncio.create_task(take(view.changes(after_revision=None), 2))
        await asyncio.sleep(0)
        await commit(faulty, put(2))
        await commit(faulty, gone(2))
        await faulty.compact(3)

        with pytest.raises(Compacted):
            await consumer


async def test_a_value_this_server_is_writing_is_not_decoded_and_anothers_is() -> None:
    store = MemoryStorage(SystemClock())
    ours, theirs = instance(1), instance(2)
    path = keys.instance("i-1").path
    async with viewing(store) as view:
        view.expect(
            "ours", {path: (encode(ours), ours), keys.instance("i-2").path: (b"of an older try", theirs)}
        )
        await view.wait_revision(await commit(store, put(1), put(2)))

        first, second = view.instance("i-1"), view.instance("i-2")
        assert first is not None
        assert first.value is ours
        assert second is not None
        assert second.value == theirs
        assert second.value is not theirs

        await view.wait_revision(await commit(store, put(1, status=InstanceStatus.STOPPED)))
        assert view.instance("i-1") == Versioned(instance(1, status=InstanceStatus.STOPPED), view.revision)

        await view.wait_revision(await commit(store, gone(1)))
        assert view.instance("i-1") is None
