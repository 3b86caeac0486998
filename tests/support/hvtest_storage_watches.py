"""The Storage contract: watches."""

import asyncio
from contextlib import aclosing

import pytest

from hvtest_storage import apply, changes_of, count_is, read_watch
from hypervisor.core.errors import Unavailable
from hypervisor.server.store.storage import (
    Change,
    Compacted,
    Delete,
    Item,
    Put,
    Storage,
    WatchBatch,
)

__all__ = ["WatchContract"]


class WatchContract:
    """What a watch delivers, and when it says that it cannot."""

    async def test_changes_carry_item_and_previous(self, storage: Storage, root: str) -> None:
        start, key = await storage.current_revision(), root + "k"
        created = await apply(storage, Put(key, b"1"))
        changed = await apply(storage, Put(key, b"2"))
        deleted = await apply(storage, Delete(key))

        batches = await read_watch(storage, root, after_revision=start, until=lambda b: len(b) == 3)

        first, second = Item(key, b"1", created, created), Item(key, b"2", created, changed)
        assert batches == [
            WatchBatch(created, (Change(key, created, first, None),)),
            WatchBatch(changed, (Change(key, changed, second, first),)),
            WatchBatch(deleted, (Change(key, deleted, None, second),)),
        ]

    async def test_watch_without_previous_still_tells_every_change(self, storage: Storage, root: str) -> None:
        start, key = await storage.current_revision(), root + "k"
        created = await apply(storage, Put(key, b"1"))
        changed = await apply(storage, Put(key, b"2"))
        deleted = await apply(storage, Delete(key))

        found: list[tuple[int, Item | None]] = []
        async with aclosing(storage.watch(root, after_revision=start, with_previous=False)) as watch:
            while len(found) < 3:
                async with asyncio.timeout(10):
                    batch = await anext(watch)
                found += [(batch.revision, change.item) for change in batch.changes]

        first, second = Item(key, b"1", created, created), Item(key, b"2", created, changed)
        assert found == [(created, first), (changed, second), (deleted, None)]

    async def test_live_changes_arrive(self, storage: Storage, root: str) -> None:
        async with aclosing(storage.watch(root, after_revision=await storage.current_revision())) as watch:
            for n in range(20):
                revision = await apply(storage, Put(root + "k", b"%d" % n))
                async with asyncio.timeout(10):
                    batch = await anext(watch)
                assert batch.revision == revision

    async def test_one_commit_is_one_batch_however_large(self, storage: Storage, root: str) -> None:
        """Together more than etcd sends in one piece: it splits them in the middle of a revision."""
        start = await storage.current_revision()
        keys = [f"{root}{n:03d}" for n in range(100)]
        revisions = [
            await apply(storage, *(Put(k, b"x" * 9000) for k in keys)),
            await apply(storage, *(Put(k, b"y" * 9000) for k in keys)),
            await apply(storage, *(Delete(k) for k in keys)),
        ]

        batches = await read_watch(storage, root, after_revision=start, until=count_is(3))

        assert [b.revision for b in batches] == revisions
        assert [sorted(c.key for c in b.changes) for b in batches] == [keys, keys, keys]
        assert all(c.item is None and c.previous is not None for c in batches[2].changes)

    async def test_watch_resumes_after_any_revision(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        revisions = [await apply(storage, Put(f"{root}{n % 3}", b"%d" % n)) for n in range(10)]

        for skipped in range(10):
            after = revisions[skipped - 1] if skipped else start
            wanted = revisions[skipped:]
            batches = await read_watch(storage, root, after_revision=after, until=count_is(len(wanted)))
            assert [b.revision for b in batches] == wanted

    async def test_prefix_is_the_beginning_of_a_key(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        names = ["a", "a/1", "ab", "b", "A", "\u00e9", "a\u00bf", "end"]
        for name in names:
            await apply(storage, Put(root + name, b""))

        everything = await read_watch(
            storage, root, after_revision=start, until=lambda b: len(b) == len(names)
        )
        below = await read_watch(storage, root + "a", after_revision=start, until=lambda b: len(b) == 4)
        inverted = await read_watch(
            storage, root + "a\u00bf", after_revision=start, until=lambda b: len(b) == 1
        )

        assert [c.key for c in changes_of(everything)] == [root + n for n in names]
        assert [c.key for c in changes_of(below)] == [root + n for n in ("a", "a/1", "ab", "a\u00bf")]
        assert [c.key for c in changes_of(inverted)] == [root + "a\u00bf"]

    async def test_empty_prefix_watches_everything(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        revision = await apply(storage, Put(root + "k", b""))

        batches = await read_watch(
            storage, "", after_revision=start, until=lambda b: bool(b) and b[-1].revision >= revision
        )

        assert root + "k" in [c.key for c in changes_of(batches)]
        assert all(c.key.startswith("/") for c in changes_of(batches))

    async def test_catch_up_of_thousands_of_revisions_is_whole_and_in_order(
        self, storage: Storage, root: str
    ) -> None:
        start = await storage.current_revision()
        total = 2500
        numbers = iter(range(total))

        async def write() -> None:
            for n in numbers:
                await storage.commit([], [Put(f"{root}{n:05d}", b"x" * 100)])

        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(write())
        batches = await read_watch(storage, root, after_revision=start, until=lambda b: len(b) >= total)

        revisions = [b.revision for b in batches]
        assert revisions == sorted(set(revisions))
        assert sorted(c.key for c in changes_of(batches)) == [f"{root}{n:05d}" for n in range(total)]

    async def test_slow_consumer_gets_everything_and_delays_nobody(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        async with aclosing(storage.watch(root, after_revision=start)) as slow:
            await apply(storage, Put(root + "first", b""))
            first = await anext(slow)
            async with asyncio.timeout(30):
                for n in range(300):
                    await apply(storage, Put(f"{root}{n}", b"x" * 20_000))
            rest: list[Change] = []
            async with asyncio.timeout(30):
                while len(rest) < 300:
                    batch = await anext(slow)
                    rest.extend(batch.changes)

        assert [c.key for c in first.changes] == [root + "first"]
        assert [c.key for c in rest] == [f"{root}{n}" for n in range(300)]

    async def test_watch_from_before_a_compaction_is_compacted(self, storage: Storage, root: str) -> None:
        before = await storage.current_revision()
        await apply(storage, Put(root + "a", b"1"))
        middle = await apply(storage, Delete(root + "a"))
        last = await apply(storage, Put(root + "a", b"3"))
        await storage.compact(middle)

        for gone in (before, middle - 1):
            async with aclosing(storage.watch(root, after_revision=gone)) as watch:
                with pytest.raises(Compacted):
                    async with asyncio.timeout(10):
                        await anext(watch)
        batches = await read_watch(storage, root, after_revision=middle, until=lambda b: len(b) == 1)
        assert [(b.revision, b.changes[0].previous) for b in batches] == [(last, None)]

    async def test_change_after_a_compaction_still_has_its_previous(
        self, storage: Storage, root: str
    ) -> None:
        first = await apply(storage, Put(root + "a", b"1"))
        compacted = await apply(storage, Put(root + "other", b"1"))
        await storage.compact(compacted)
        await apply(storage, Put(root + "a", b"2"))

        batches = await read_watch(storage, root, after_revision=compacted, until=lambda b: len(b) == 1)

        assert batches[0].changes[0].previous == Item(root + "a", b"1", first, first)

    async def test_watch_from_the_future_is_compacted(self, storage: Storage, root: str) -> None:
        async with aclosing(
            storage.watch(root, after_revision=await storage.current_revision() + 1000)
        ) as watch:
            with pytest.raises(Compacted):
                async with asyncio.timeout(10):
                    await anext(watch)

    async def test_watch_from_the_revision_of_a_list_misses_nothing(
        self, storage: Storage, root: str
    ) -> None:
        async def write() -> None:
            for n in range(200):
                await apply(storage, Put(f"{root}{n:03d}", b""))

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            pages = []
            for _ in range(10):
                pages.append(await storage.list(root))
                await asyncio.sleep(0)
        everything = [f"{root}{n:03d}" for n in range(200)]
        for page in pages[::3]:
            known = [i.key for i in page.items]
            batches: list[WatchBatch] = []
            if len(known) < len(everything):
                batches = await read_watch(
                    storage,
                    root,
                    after_revision=page.revision,
                    until=count_is(len(everything) - len(known)),
                )
            assert known + [c.key for c in changes_of(batches)] == everything

    async def test_many_watches_at_once(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        async with asyncio.TaskGroup() as group:
            readers = [
                group.create_task(
                    read_watch(storage, f"{root}{n}/", after_revision=start, until=lambda b: len(b) == 20)
                )
                for n in range(20)
            ]
            for step in range(20):
                await apply(storage, *(Put(f"{root}{n}/{step}", b"") for n in range(20)))

        for n, reader in enumerate(readers):
            assert [c.key for c in changes_of(reader.result())] == [f"{root}{n}/{s}" for s in range(20)]

    async def test_cancelled_watch_ends(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        reader = asyncio.create_task(read_watch(storage, root, after_revision=start, until=lambda b: False))
        await apply(storage, Put(root + "k", b""))
        reader.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reader
        await apply(storage, Put(root + "k", b"still works"))

    async def test_close_ends_watches_and_refuses_everything_after(self, storage: Storage, root: str) -> None:
        start = await storage.current_revision()
        await apply(storage, Put(root + "k", b""))
        seen = asyncio.Event()

        async def read() -> None:
            async with aclosing(storage.watch(root, after_revision=start)) as watch:
                async for _ in watch:
                    seen.set()

        reader = asyncio.create_task(read())
        async with asyncio.timeout(10):
            await seen.wait()
            await storage.aclose()
            await storage.aclose()
            with pytest.raises(Unavailable) as caught:
                await reader

        assert caught.value.reason == "STORE_CLOSED"
        for call in (
            storage.get(root),
            storage.list(root),
            storage.commit([], [Put(root, b"")]),
            storage.grant_lease(5),
            storage.keep_alive("1"),
            storage.revoke_lease("1"),
            storage.compact(1),
            storage.current_revision(),
            anext(storage.watch(root, after_revision=0)),
        ):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.reason == "STORE_CLOSED"
