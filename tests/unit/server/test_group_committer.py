"""Group commit: what shares a transaction, what is decided anew, and who gets which answer."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import AlreadyExists, Conflict, Internal, NotFound, ResourceExhausted, Unavailable
from hypervisor.core.model import encode
from hypervisor.server import keys
from hypervisor.server.cluster_state import Update
from hypervisor.server.committer import GroupCommitter, Knowledge, Lane
from hypervisor.server.drafts import Decision, Draft
from hypervisor.server.records import NameClaim
from hypervisor.server.services import Versioned
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import (
    MAX_OPERATIONS,
    MAX_VALUE_BYTES,
    Committed,
    Compare,
    Conflicted,
    Delete,
    Item,
    Operation,
    OutcomeUnknown,
    Put,
)
from hypervisor.server.view import StoreView, ViewSettings


class WatchedStore(MemoryStorage):
    """Records commits, and lets tests interfere before the next one."""

    def __init__(self) -> None:
        super().__init__(SystemClock())
        self.transactions: list[int] = []
        self.begun = asyncio.Event()
        self.before: list[Operation] = []
        self.gate: asyncio.Event | None = None
        self.error: Unavailable | None = None

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        self.transactions.append(len(operations))
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        while self.before:
            await super().commit([], [self.before.pop()])
        return await super().commit(compares, operations)


@asynccontextmanager
async def committing() -> AsyncIterator[tuple[WatchedStore, GroupCommitter]]:
    store = WatchedStore()
    view = StoreView(store, SystemClock(), settings=ViewSettings(verify_interval_s=3600))
    committer = GroupCommitter(store, view, SystemClock(), rng=random.Random(1))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in (view.run(), committer.run())]
        await view.loaded()
        try:
            yield store, committer
        finally:
            for task in tasks:
                task.cancel()
    await store.aclose()


def claim(name: str, owner: str, *, pad: int = 0) -> Decision[str]:
    """Take a name if it is free."""

    def decide(draft: Draft) -> str:
        found = draft.get(keys.name("p", name))
        if found is not None:
            raise AlreadyExists(found.value.instance_id)
        draft.put(keys.name("p", name), NameClaim(instance_id=owner + "x" * pad))
        return owner

    return decide


async def test_decisions_made_at_once_share_transactions() -> None:
    async with committing() as (store, committer):
        made = await asyncio.gather(*(committer.commit(claim(f"n{n}", str(n))) for n in range(300)))

        assert [d.value for d in made] == [str(n) for n in range(300)]
        assert store.transactions == [MAX_OPERATIONS, MAX_OPERATIONS, 60]
        assert len({d.revision for d in made}) == 3


async def test_a_decision_sees_what_those_before_it_wrote() -> None:
    async with committing() as (store, committer):
        first, second = await asyncio.gather(
            committer.commit(claim("n", "one")), committer.commit(claim("n", "two")), return_exceptions=True
        )

        assert not isinstance(first, BaseException)
        assert isinstance(second, AlreadyExists)
        assert str(second) == "one"
        assert len(store.transactions) == 1


async def test_a_refused_decision_leaves_nothing_and_does_not_harm_the_others() -> None:
    def half(draft: Draft) -> None:
        draft.put(keys.name("p", "half"), NameClaim(instance_id="i"))
        raise NotFound("no")

    def broken(draft: Draft) -> None:
        raise ZeroDivisionError

    async with committing() as (store, committer):
        refused, defect, made = await asyncio.gather(
            committer.commit(half),
            committer.commit(broken),
            committer.commit(claim("n", "one")),
            return_exceptions=True,
        )

        assert isinstance(refused, NotFound)
        assert isinstance(defect, Internal)
        assert not isinstance(made, BaseException)
        assert await store.get(keys.name("p", "half").path) is None


async def test_what_another_server_changed_is_decided_anew_refusals_included() -> None:
    async with committing() as (store, committer):
        await committer.commit(claim("old", "x"))
        taken = keys.name("p", "a").path
        store.before = [Put(taken, encode(NameClaim(instance_id="other")))]
        calls: list[str] = []

        def refuses_at_first(draft: Draft) -> str:
            calls.append("x")
            if draft.get(keys.name("p", "a")) is None:
                raise NotFound("a is not there yet")
            return "found it"

        a, b, c = await asyncio.gather(
            committer.commit(refuses_at_first),
            committer.commit(claim("a", "me")),
            committer.commit(claim("b", "me")),
            return_exceptions=True,
        )

        assert not isinstance(a, BaseException)
        assert a.value == "found it"
        assert isinstance(b, AlreadyExists)
        assert str(b) == "other"
        assert not isinstance(c, BaseException)
        assert len(calls) == 2


async def test_a_lane_does_not_wait_for_the_other_lanes_transaction() -> None:
    async with committing() as (store, committer):
        held = store.gate = asyncio.Event()
        slow = asyncio.create_task(committer.commit(claim("n", "one")))
        await store.begun.wait()
        store.gate = None

        made = await committer.commit(claim("m", "two"), lane=Lane.PLACEMENTS)

        assert not slow.done()
        held.set()
        assert (await slow).revision > made.revision


async def test_lanes_that_meet_on_a_record_decide_anew() -> None:
    async with committing() as (store, committer):
        held = store.gate = asyncio.Event()
        slow = asyncio.create_task(committer.commit(claim("n", "one")))
        await store.begun.wait()
        store.gate = None
        await committer.commit(claim("n", "two"), lane=Lane.PLACEMENTS)
        held.set()

        with pytest.raises(AlreadyExists, match="two"):
            await slow


async def test_answers_in_the_other_order_do_not_make_knowledge_older() -> None:
    view = StoreView(MemoryStorage(SystemClock()), SystemClock())
    known, key = Knowledge(view), keys.name("p", "n")
    old = Item(key.path, encode(NameClaim(instance_id="old")), 3, 3)

    known.learn_commit(5, [Update(key.path, Versioned(NameClaim(instance_id="new"), 5))])
    known.learn_items(4, {key.path: old})
    known.learn_commit(3, [Update(key.path, Versioned(NameClaim(instance_id="old"), 3))])

    assert known.find(key) == Versioned(NameClaim(instance_id="new"), 5)
    assert known.mod_revision(key.path) == 5


async def test_the_callback_runs_even_if_the_caller_is_gone() -> None:
    async with committing() as (store, committer):
        store.gate = asyncio.Event()
        told: list[str] = []
        gone = asyncio.create_task(committer.commit(claim("n", "one"), then=lambda v, _: told.append(v)))
        await store.begun.wait()
        waiting = asyncio.create_task(committer.commit(claim("m", "two"), then=lambda v, _: told.append(v)))
        await asyncio.sleep(0)
        gone.cancel()
        waiting.cancel()
        store.gate.set()
        await committer.commit(claim("o", "three"))

        assert told == ["one"], "one was being committed; two was not begun, and is withdrawn"
        assert await store.get(keys.name("p", "m").path) is None


async def test_a_store_that_fails_fails_each_caller_with_an_error_of_its_own() -> None:
    async with committing() as (store, committer):
        store.error = Unavailable("down", reason="STORE_UNAVAILABLE", retry_after_s=1.0)
        failed = await asyncio.gather(
            *(committer.commit(claim(f"n{n}", "x")) for n in range(3)), return_exceptions=True
        )
        store.error = None

        assert len({id(f) for f in failed}) == 3
        assert {(type(f), getattr(f, "reason", "")) for f in failed} == {(Unavailable, "STORE_UNAVAILABLE")}
        assert (await committer.commit(claim("n0", "y"))).value == "y"


async def test_a_record_too_large_is_refused_alone() -> None:
    async with committing() as (_, committer):
        large, small = await asyncio.gather(
            committer.commit(claim("large", "x", pad=MAX_VALUE_BYTES)),
            committer.commit(claim("small", "y")),
            return_exceptions=True,
        )

        assert isinstance(large, ResourceExhausted)
        assert large.reason == "RECORD_TOO_LARGE"
        assert not isinstance(small, BaseException)


async def test_large_records_are_spread_over_transactions() -> None:
    async with committing() as (store, committer):
        await asyncio.gather(*(committer.commit(claim(f"n{n}", "x", pad=400_000)) for n in range(10)))

        assert store.transactions == [3, 3, 3, 1]


async def test_a_lease_that_ended_fails_only_who_named_it() -> None:
    def with_lease(draft: Draft) -> None:
        draft.put(keys.name("p", "leased"), NameClaim(instance_id="i"), lease_id="no-such-lease")

    async with committing() as (_, committer):
        leased, plain = await asyncio.gather(
            committer.commit(with_lease), committer.commit(claim("n", "x")), return_exceptions=True
        )

        assert isinstance(leased, NotFound)
        assert leased.reason == "LEASE_NOT_FOUND"
        assert not isinstance(plain, BaseException)


async def test_a_leader_that_was_deposed_commits_nothing() -> None:
    async with committing() as (store, committer):
        fence_key = f"{keys.LEADER_PREFIX}lease"
        outcome = await store.commit([], [Put(fence_key, b"s-1")])
        assert isinstance(outcome, Committed)
        fence = Compare(fence_key, outcome.revision)

        def as_leader(draft: Draft) -> None:
            draft.guard(fence)
            draft.put(keys.name("p", "n"), NameClaim(instance_id="i"))

        await committer.commit(as_leader)
        store.before = [Put(fence_key, b"s-2")]
        with pytest.raises(Conflict) as deposed:
            await committer.commit(lambda draft: (as_leader(draft), draft.delete(keys.name("p", "n"))))

        assert deposed.value.reason == "LEADERSHIP_LOST"
        assert await store.get(keys.name("p", "n").path) is not None


async def test_what_waits_when_the_server_stops_is_told() -> None:
    store = WatchedStore()
    store.gate = asyncio.Event()
    view = StoreView(store, SystemClock())
    committer = GroupCommitter(store, view, SystemClock(), rng=random.Random(1))
    tasks = [asyncio.create_task(work) for work in (view.run(), committer.run())]
    begun = asyncio.create_task(committer.commit(claim("n", "x")))
    await store.begun.wait()
    waiting = asyncio.create_task(committer.commit(claim("m", "x")))
    await asyncio.sleep(0)

    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

    with pytest.raises(OutcomeUnknown):
        await begun
    for call in (waiting, committer.commit(claim("o", "x"))):
        with pytest.raises(Unavailable) as stopped:
            await call
        assert stopped.value.reason == "SERVER_STOPPING"
    await store.aclose()


async def test_nobody_is_refused_for_what_is_not_so_any_more() -> None:
    """Seed 2: a server that was cut off took a name for taken that was free."""
    async with committing() as (store, committer):
        await committer.commit(claim("n", "a"))
        store.before.append(Delete(keys.name("p", "n").path))

        assert (await committer.commit(claim("n", "b"))).value == "b"


async def test_a_refusal_while_the_store_is_away_is_unavailable() -> None:
    async with committing() as (store, committer):
        await committer.commit(claim("n", "a"))
        store.error = Unavailable("away", reason="STORE_UNAVAILABLE")

        with pytest.raises(Unavailable):
            await committer.commit(claim("n", "b"))


async def test_a_refusal_that_lost_a_conflict_rests_on_the_stores_answer_and_is_not_compared_again() -> None:
    async with committing() as (store, committer):
        await committer.commit(claim("n", "a"))
        store.before.append(Put(keys.name("p", "n").path, encode(NameClaim(instance_id="c"))))
        before = len(store.transactions)

        with pytest.raises(AlreadyExists, match="c"):
            await committer.commit(claim("n", "b"))

        assert len(store.transactions) == before + 1
