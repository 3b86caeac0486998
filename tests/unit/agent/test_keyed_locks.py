"""One task at a time for each key."""

import asyncio

import pytest

from hypervisor.agent.drivers.keyed_locks import KeyedLocks


async def test_one_key_is_held_by_one_task_at_a_time_and_in_order() -> None:
    locks, order = KeyedLocks(), []

    async def work(number: int) -> None:
        async with locks.hold("key"):
            order.append(("in", number))
            await asyncio.sleep(0)
            order.append(("out", number))

    await asyncio.gather(*(work(number) for number in range(3)))

    assert order == [("in", 0), ("out", 0), ("in", 1), ("out", 1), ("in", 2), ("out", 2)]


async def test_other_keys_do_not_wait() -> None:
    locks = KeyedLocks()

    async with locks.hold("a"), asyncio.timeout(5), locks.hold("b"):
        pass


async def test_a_cancelled_or_failed_holder_lets_the_next_one_in_and_leaves_nothing() -> None:
    locks = KeyedLocks()
    async with locks.hold("key"):
        waiting = asyncio.ensure_future(_fail(locks))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    with pytest.raises(ValueError, match="inside"):
        await _fail(locks)

    async with asyncio.timeout(5), locks.hold("key"):
        pass
    assert waiting.cancelled()
    assert locks._locks == {}


async def _fail(locks: KeyedLocks) -> None:
    async with locks.hold("key"):
        raise ValueError("inside")
