"""The Storage contract: commits and reads."""

import asyncio

import pytest

from hvtest_storage import apply, conflicted, eventually, read_watch
from hypervisor.core.errors import InvalidArgument
from hypervisor.server.store.storage import (
    ABSENT,
    MAX_KEY_BYTES,
    MAX_OPERATIONS,
    MAX_VALUE_BYTES,
    Committed,
    Compacted,
    Compare,
    Delete,
    Item,
    Operation,
    Put,
    Storage,
)

__all__ = ["CommitContract", "ReadContract"]


class CommitContract:
    """Compare-and-commit."""

    async def test_put_is_read_back_with_its_revisions(self, storage: Storage, root: str) -> None:
        first = await apply(storage, Put(root + "k", b"1"))
        second = await apply(storage, Put(root + "k", b"2"))

        assert await storage.get(root + "k") == Item(root + "k", b"2", first, second)

    async def test_revisions_rise_with_every_change(self, storage: Storage, root: str) -> None:
        before = await storage.current_revision()
        revisions = [await apply(storage, Put(root + "k", b"%d" % n)) for n in range(5)]

        assert revisions == sorted(set(revisions))
        assert revisions[0] > before
        assert await storage.current_revision() >= revisions[-1]

    async def test_get_of_a_missing_key_is_none(self, storage: Storage, root: str) -> None:
        assert await storage.get(root + "missing") is None

    async def test_all_operations_of_a_commit_share_one_revision(self, storage: Storage, root: str) -> None:
        await apply(storage, Put(root + "gone", b""))
        revision = await apply(storage, Put(root + "a", b"1"), Put(root + "b", b"2"), Delete(root + "gone"))

        page = await storage.list(root)
        assert [(i.key, i.mod_revision) for i in page.items] == [
            (root + "a", revision),
            (root + "b", revision),
        ]

    async def test_absent_compare_creates_once(self, storage: Storage, root: str) -> None:
        key = root + "k"
        created = await apply(storage, Put(key, b"1"), compares=(Compare(key, ABSENT),))
        outcome = conflicted(await storage.commit([Compare(key, ABSENT)], [Put(key, b"2")]))

        assert outcome.current == {key: Item(key, b"1", created, created)}
        assert outcome.revision >= created
        assert (await storage.get(key)) == Item(key, b"1", created, created)

    async def test_conflict_tells_every_compared_key_and_writes_nothing(
        self, storage: Storage, root: str
    ) -> None:
        revision = await apply(storage, Put(root + "a", b"1"))
        outcome = conflicted(
            await storage.commit(
                [Compare(root + "a", revision), Compare(root + "b", revision), Compare(root + "c", ABSENT)],
                [Put(root + "a", b"2"), Put(root + "d", b"3")],
            )
        )

        assert outcome.current == {
            root + "a": Item(root + "a", b"1", revision, revision),
            root + "b": None,
            root + "c": None,
        }
        assert [i.key for i in (await storage.list(root)).items] == [root + "a"]

    async def test_compare_of_an_old_revision_conflicts_after_recreation(
        self, storage: Storage, root: str
    ) -> None:
        key = root + "k"
        old = await apply(storage, Put(key, b"1"))
        await apply(storage, Delete(key))
        await apply(storage, Put(key, b"1"))

        conflicted(await storage.commit([Compare(key, old)], [Put(key, b"2")]))

    async def test_delete_makes_a_key_absent(self, storage: Storage, root: str) -> None:
        key = root + "k"
        await apply(storage, Put(key, b"1"))
        await apply(storage, Delete(key))

        assert await storage.get(key) is None
        recreated = await apply(storage, Put(key, b"2"), compares=(Compare(key, ABSENT),))
        assert await storage.get(key) == Item(key, b"2", recreated, recreated)

    async def test_delete_of_an_absent_key_does_nothing(self, storage: Storage, root: str) -> None:
        outcome = await storage.commit([], [Delete(root + "missing")])

        assert isinstance(outcome, Committed)
        assert (await storage.list(root)).items == ()

    async def test_commit_of_compares_alone_checks_them(self, storage: Storage, root: str) -> None:
        revision = await apply(storage, Put(root + "k", b"1"))

        assert isinstance(await storage.commit([Compare(root + "k", revision)], []), Committed)
        conflicted(await storage.commit([Compare(root + "k", ABSENT)], []))

    async def test_any_bytes_and_any_text_survive(self, storage: Storage, root: str) -> None:
        key = root + "schlüssel/\N{SNOWMAN} %_'\"\\\n"
        value = bytes(range(256))
        await apply(storage, Put(key, value))

        item = await storage.get(key)
        assert item is not None
        assert item.value == value
        assert [i.key for i in (await storage.list(root + "schlü")).items] == [key]

    async def test_largest_legal_commit_is_taken(self, storage: Storage, root: str) -> None:
        keys = [f"{root}{n:03d}" for n in range(MAX_OPERATIONS)]
        value = b"x" * 10_000
        await apply(storage, *(Put(k, value) for k in keys), compares=tuple(Compare(k, ABSENT) for k in keys))
        await apply(storage, Put(root + "big", b"y" * MAX_VALUE_BYTES))

        page = await storage.list(root)
        assert len(page.items) == MAX_OPERATIONS + 1
        assert {len(i.value) for i in page.items} == {len(value), MAX_VALUE_BYTES}

    @pytest.mark.parametrize(
        ("operations", "reason"),
        [
            ([Put("/k", b"x" * (MAX_VALUE_BYTES + 1))], "VALUE_TOO_LARGE"),
            ([Put("/k" + "x" * MAX_KEY_BYTES, b"")], "KEY_INVALID"),
            ([Put("", b"")], "KEY_INVALID"),
            ([Put("no-slash", b"")], "KEY_INVALID"),
            ([Delete("/nul\0")], "KEY_INVALID"),
            ([Put("/surrogate\ud800", b"")], "KEY_INVALID"),
            ([Put("/k", b"1"), Delete("/k")], "DUPLICATE_KEY"),
            ([Put(f"/{n}", b"") for n in range(MAX_OPERATIONS + 1)], "TOO_MANY_OPERATIONS"),
            ([Put(f"/{n}", b"x" * 900_000) for n in range(2)], "COMMIT_TOO_LARGE"),
        ],
    )
    async def test_commit_outside_the_limits_is_refused_by_name(
        self, storage: Storage, operations: list[Operation], reason: str
    ) -> None:
        before = await storage.current_revision()
        with pytest.raises(InvalidArgument) as caught:
            await storage.commit([], operations)

        assert caught.value.reason == reason
        assert caught.value.metadata["field"].startswith("operations")
        assert await storage.current_revision() == before

    async def test_no_update_is_lost_in_10000_contended_commits(self, storage: Storage, root: str) -> None:
        """Tasks increment shared counters by compare-and-commit; a watch sees each step once and in order."""
        total, tasks, counters = 10_000, 8, 4
        left = iter(range(total))
        conflicts = 0

        async def increment(task: int) -> None:
            nonlocal conflicts
            for n in left:
                key = f"{root}{(n + task) % counters}"
                item = await storage.get(key)
                await asyncio.sleep(0)  # lets others in, also where the backend never waits
                while True:
                    value, revision = (int(item.value), item.mod_revision) if item else (0, ABSENT)
                    outcome = await storage.commit([Compare(key, revision)], [Put(key, b"%d" % (value + 1))])
                    if isinstance(outcome, Committed):
                        break
                    conflicts += 1
                    item = outcome.current[key]

        start = await storage.current_revision()
        watching = asyncio.create_task(
            read_watch(storage, root, after_revision=start, until=lambda b: len(b) == total, timeout_s=100)
        )
        async with asyncio.TaskGroup() as group:
            for task in range(tasks):
                group.create_task(increment(task))

        page = await storage.list(root)
        assert sum(int(i.value) for i in page.items) == total
        assert conflicts > 0
        steps: dict[str, int] = {}
        for batch in await watching:
            (change,) = batch.changes
            assert change.item is not None
            assert int(change.item.value) == steps.get(change.key, 0) + 1
            assert (change.previous.value if change.previous else b"0") == b"%d" % steps.get(change.key, 0)
            steps[change.key] = int(change.item.value)


class ReadContract:
    """Lists, pages, revisions in the past."""

    async def test_list_is_in_key_order_and_bounded_by_the_prefix(self, storage: Storage, root: str) -> None:
        names = ["b", "a", "a/x", "a0", "a.", "aé", "a\U0001f600", "c"]
        await apply(storage, *(Put(root + n, n.encode()) for n in names))

        everything = [i.key for i in (await storage.list(root)).items]
        assert everything == sorted((root + n for n in names), key=str.encode)
        assert [i.key for i in (await storage.list(root + "a")).items] == [
            k for k in everything if k.startswith(root + "a")
        ]
        assert [i.key for i in (await storage.list(root + "a/")).items] == [root + "a/x"]
        assert (await storage.list(root + "zzz")).items == ()

    async def test_prefix_that_ends_in_the_last_byte_of_a_utf8_sequence(
        self, storage: Storage, root: str
    ) -> None:
        # U+00BF is C2 BF: the key after it would not be legal UTF-8.
        await apply(storage, Put(root + "\u00bf1", b""), Put(root + "\u00c0", b""), Put(root + "\u00be", b""))

        assert [i.key for i in (await storage.list(root + "\u00bf")).items] == [root + "\u00bf1"]

    async def test_empty_prefix_lists_everything(self, storage: Storage, root: str) -> None:
        await apply(storage, Put(root + "k", b""))

        page = await storage.list("", limit=10_000)
        assert root + "k" in [i.key for i in page.items]
        assert all(i.key.startswith("/") for i in page.items)

    async def test_pages_are_one_view_while_others_write(self, storage: Storage, root: str) -> None:
        keys = [f"{root}{n:04d}" for n in range(0, 500, 2)]
        for start in range(0, len(keys), 100):
            await apply(storage, *(Put(k, b"old") for k in keys[start : start + 100]))

        first = await storage.list(root, limit=37)
        found, start_key, revision = list(first.items), first.next_key, first.revision
        round_number = 0
        while start_key:
            # Between two pages: a change and a deletion ahead and behind, and a new key in every gap.
            await apply(
                storage,
                Put(keys[-1 - round_number], b"new"),
                Delete(keys[round_number * 11]),
                Put(f"{root}{round_number * 40 + 1:04d}", b"new"),
            )
            round_number += 1
            page = await storage.list(root, start_key=start_key, limit=37, revision=revision)
            assert page.revision == revision
            found += page.items
            start_key = page.next_key

        assert round_number > 4
        assert [(i.key, i.value) for i in found] == [(k, b"old") for k in keys]

    async def test_full_last_page_has_no_next(self, storage: Storage, root: str) -> None:
        await apply(storage, Put(root + "a", b""), Put(root + "b", b""))

        assert (await storage.list(root, limit=2)).next_key == ""
        assert (await storage.list(root, limit=1)).next_key == root + "b"

    async def test_list_of_a_past_revision(self, storage: Storage, root: str) -> None:
        old = await apply(storage, Put(root + "a", b"1"), Put(root + "b", b"1"))
        await apply(storage, Put(root + "a", b"2"), Delete(root + "b"), Put(root + "c", b"2"))

        page = await storage.list(root, revision=old)
        assert [(i.key, i.value, i.mod_revision) for i in page.items] == [
            (root + "a", b"1", old),
            (root + "b", b"1", old),
        ]

    async def test_list_of_a_compacted_revision_is_compacted(self, storage: Storage, root: str) -> None:
        old = await apply(storage, Put(root + "a", b"1"))
        kept = await apply(storage, Put(root + "a", b"2"))
        newest = await apply(storage, Put(root + "a", b"3"))
        await storage.compact(kept)

        with pytest.raises(Compacted):
            await storage.list(root, revision=old)
        assert [i.value for i in (await storage.list(root, revision=kept)).items] == [b"2"]
        assert [i.value for i in (await storage.list(root, revision=newest)).items] == [b"3"]

    async def test_list_of_a_future_revision_is_compacted(self, storage: Storage, root: str) -> None:
        with pytest.raises(Compacted):
            await storage.list(root, revision=await storage.current_revision() + 1000)

    @pytest.mark.parametrize("arguments", [{"limit": 0}, {"limit": 10_001}, {"start_key": "/elsewhere"}])
    async def test_list_refuses_bad_arguments(
        self, storage: Storage, root: str, arguments: dict[str, object]
    ) -> None:
        with pytest.raises(InvalidArgument):
            await storage.list(root, **arguments)  # type: ignore[arg-type]

    async def test_compaction_keeps_current_values(self, storage: Storage, root: str) -> None:
        await apply(storage, Put(root + "a", b"1"), Put(root + "gone", b"1"))
        await apply(storage, Put(root + "a", b"2"), Delete(root + "gone"))
        await apply(storage, Put(root + "b", b"3"))
        before = (await storage.list(root)).items
        await storage.compact(await storage.current_revision())
        await storage.compact(1)

        assert (await storage.list(root)).items == before
        await eventually(lambda: _reads(storage, root + "a", b"2"))

    async def test_compaction_beyond_the_newest_revision_is_refused(self, storage: Storage) -> None:
        with pytest.raises(InvalidArgument):
            await storage.compact(await storage.current_revision() + 1000)


async def _reads(storage: Storage, key: str, value: bytes) -> bool:
    item = await storage.get(key)
    return item is not None and item.value == value
