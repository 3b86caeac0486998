"""The Storage contract: leases and elections."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from hvtest_storage import apply, conflicted, eventually, read_watch
from hypervisor.core.errors import InvalidArgument, NotFound
from hypervisor.server.store.storage import ABSENT, Committed, Compare, Delete, Item, Leadership, Put, Storage

__all__ = ["ElectionContract", "LeaseContract"]


class LeaseContract:
    """Keys that end with their lease."""

    async def test_expired_lease_takes_its_keys_along_in_one_commit(
        self, storage: Storage, root: str
    ) -> None:
        lease = await storage.grant_lease(1)
        assert lease.ttl_s >= 1
        await apply(storage, Put(root + "a", b"1", lease.id), Put(root + "b", b"2", lease.id))
        after = await apply(storage, Put(root + "c", b"stays"))
        assert (await storage.get(root + "a")) is not None

        batches = await read_watch(storage, root, after_revision=after, until=lambda b: len(b) == 1)

        assert sorted(c.key for c in batches[0].changes) == [root + "a", root + "b"]
        assert all(c.item is None and c.previous is not None for c in batches[0].changes)
        assert {c.previous.lease_id for c in batches[0].changes if c.previous} == {lease.id}
        assert [i.key for i in (await storage.list(root)).items] == [root + "c"]
        with pytest.raises(NotFound) as caught:
            await storage.keep_alive(lease.id)
        assert caught.value.reason == "LEASE_NOT_FOUND"

    async def test_keep_alive_keeps_a_lease_beyond_its_time(self, storage: Storage, root: str) -> None:
        kept, dropped = await storage.grant_lease(2), await storage.grant_lease(1)
        await apply(storage, Put(root + "kept", b"", kept.id), Put(root + "dropped", b"", dropped.id))

        async def dropped_is_gone() -> bool:
            assert await storage.keep_alive(kept.id) == kept.ttl_s
            return await storage.get(root + "dropped") is None

        loop = asyncio.get_running_loop()
        begin = loop.time()
        await eventually(dropped_is_gone)

        async def kept_beyond_its_time() -> bool:
            await storage.keep_alive(kept.id)
            return loop.time() - begin > kept.ttl_s + 0.5

        await eventually(kept_beyond_its_time)
        assert await storage.get(root + "kept") is not None

    async def test_revoke_deletes_the_keys_at_once(self, storage: Storage, root: str) -> None:
        lease = await storage.grant_lease(60)
        await apply(storage, Put(root + "a", b"", lease.id))
        await storage.revoke_lease(lease.id)

        assert await storage.get(root + "a") is None
        await storage.revoke_lease(lease.id)
        with pytest.raises(NotFound):
            await storage.keep_alive(lease.id)

    async def test_unknown_lease_is_not_found(self, storage: Storage) -> None:
        for lease_id in ("0000000000000fff", "not-a-lease"):
            with pytest.raises(NotFound) as caught:
                await storage.keep_alive(lease_id)
            assert caught.value.reason == "LEASE_NOT_FOUND"
            await storage.revoke_lease(lease_id)

    async def test_put_with_an_ended_lease_writes_nothing(self, storage: Storage, root: str) -> None:
        ended, alive = await storage.grant_lease(60), await storage.grant_lease(60)
        await storage.revoke_lease(ended.id)

        with pytest.raises(NotFound) as caught:
            await storage.commit(
                [], [Put(root + "a", b""), Put(root + "b", b"", alive.id), Put(root + "c", b"", ended.id)]
            )
        assert caught.value.reason == "LEASE_NOT_FOUND"
        assert caught.value.metadata["lease_id"] == ended.id
        assert (await storage.list(root)).items == ()
        conflicted(await storage.commit([Compare(root + "a", 1)], [Put(root + "c", b"", ended.id)]))

    async def test_put_changes_the_binding(self, storage: Storage, root: str) -> None:
        first, second = await storage.grant_lease(60), await storage.grant_lease(60)
        await apply(storage, *(Put(root + k, b"", first.id) for k in ("freed", "moved", "kept", "deleted")))
        await apply(
            storage, Put(root + "freed", b""), Put(root + "moved", b"", second.id), Delete(root + "deleted")
        )
        recreated = await apply(storage, Put(root + "deleted", b"again"))
        await storage.revoke_lease(first.id)

        items = {i.key: i for i in (await storage.list(root)).items}
        assert sorted(items) == [root + "deleted", root + "freed", root + "moved"]
        assert items[root + "moved"].lease_id == second.id
        assert items[root + "freed"].lease_id == ""
        assert items[root + "deleted"] == Item(root + "deleted", b"again", recreated, recreated)

    @pytest.mark.parametrize("ttl_s", [0, 0.5, -1, float("nan"), 1e12])
    async def test_time_to_live_outside_the_limits_is_refused(self, storage: Storage, ttl_s: float) -> None:
        with pytest.raises(InvalidArgument):
            await storage.grant_lease(ttl_s)


class ElectionContract:
    """One leader at a time, and a fence against those who only think they are."""

    async def test_single_candidate_leads_and_resigns(self, storage: Storage, election_name: str) -> None:
        async with storage.election(election_name, "one", ttl_s=5) as election:
            async with asyncio.timeout(10):
                leadership = await election.acquire()
            assert (leadership.name, leadership.leader_id) == (election_name, "one")
            assert isinstance(await storage.commit([leadership.fence], []), Committed)

        conflicted(await storage.commit([leadership.fence], []))

    async def test_candidates_lead_in_the_order_they_came(self, storage: Storage, election_name: str) -> None:
        order: list[str] = []
        entered = asyncio.Queue[str]()

        async def stand(name: str) -> None:
            async with storage.election(election_name, name, ttl_s=10) as election:
                entered.put_nowait(name)
                leadership = await election.acquire()
                order.append(leadership.leader_id)

        names = [f"candidate-{n}" for n in range(5)]
        async with (
            asyncio.timeout(30),
            asyncio.TaskGroup() as group,
            storage.election(election_name, "first", ttl_s=10) as first,
        ):
            await first.acquire()
            for name in names:
                group.create_task(stand(name))
                assert await entered.get() == name
            assert order == []

        assert order == names

    async def test_fence_refuses_a_leader_that_was_deposed(
        self, storage: Storage, root: str, election_name: str
    ) -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(20):
            old = await stack.enter_async_context(storage.election(election_name, "old", ttl_s=3))
            deposed = await old.acquire()
            new = await stack.enter_async_context(storage.election(election_name, "new", ttl_s=3))
            waiting = asyncio.create_task(new.acquire())
            await storage.revoke_lease(await _lease_of(storage, deposed))
            successor = await waiting

            conflicted(await storage.commit([deposed.fence], [Put(root + "k", b"old")]))
            assert isinstance(await storage.commit([successor.fence], [Put(root + "k", b"new")]), Committed)
            await old.lost()
        item = await storage.get(root + "k")
        assert item is not None
        assert item.value == b"new"

    async def test_leader_notices_that_its_key_was_deleted_and_can_stand_again(
        self, storage: Storage, election_name: str
    ) -> None:
        async with storage.election(election_name, "one", ttl_s=2) as election, asyncio.timeout(20):
            first = await election.acquire()
            await apply(storage, Delete(first.fence.key))
            await election.lost()
            second = await election.acquire()

            conflicted(await storage.commit([first.fence], []))
            assert isinstance(await storage.commit([second.fence], []), Committed)

    async def test_leadership_outlives_the_time_to_live(self, storage: Storage, election_name: str) -> None:
        async with storage.election(election_name, "one", ttl_s=1) as election:
            leadership = await election.acquire()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.5):
                    await election.lost()

            assert isinstance(await storage.commit([leadership.fence], []), Committed)

    async def test_waiting_candidate_can_give_up(self, storage: Storage, election_name: str) -> None:
        async with (
            storage.election(election_name, "leader", ttl_s=5) as leader,
            storage.election(election_name, "other", ttl_s=5) as other,
        ):
            await leader.acquire()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await other.acquire()

        page = await storage.list(f"/hypervisor/elections/{election_name}/")
        assert page.items == ()

    async def test_fence_of_a_leader_compares_a_key_that_exists(
        self, storage: Storage, election_name: str
    ) -> None:
        async with storage.election(election_name, "one", ttl_s=5) as election:
            leadership = await election.acquire()
            assert leadership.fence.mod_revision != ABSENT
            item = await storage.get(leadership.fence.key)
            assert item is not None
            assert item.value == b"one"


async def _lease_of(storage: Storage, leadership: Leadership) -> str:
    item = await storage.get(leadership.fence.key)
    assert item is not None
    return item.lease_id
