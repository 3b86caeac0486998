"""What tests of drivers watch: the events a driver tells, and what an instance shows on its console."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hvtest_agent_waiting import within
from hypervisor.agent.drivers.driver import Console, Driver
from hypervisor.core.model import Observation

__all__ = ["events_of", "read_until", "the_end"]


async def read_until(console: Console, wanted: bytes, *, times: int = 1) -> bytes:
    """All output up to the text, seen so many times."""
    seen = b""

    async def collect() -> None:
        nonlocal seen
        while seen.count(wanted) < times:
            data = await console.read()
            assert data, f"the console ended before {wanted!r}; seen: {seen!r}"
            seen += data

    await within(collect(), what=f"the console shows {wanted!r}", timeout_s=20.0)
    return seen


@asynccontextmanager
async def events_of(driver: Driver) -> AsyncIterator["asyncio.Queue[Observation]"]:
    """The driver's events, consumed from now on."""
    queue: asyncio.Queue[Observation] = asyncio.Queue()

    async def consume() -> None:
        async for seen in driver.events():
            queue.put_nowait(seen)

    task = asyncio.ensure_future(consume())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def the_end(queue: "asyncio.Queue[Observation]", instance_id: str) -> Observation:
    """The event that tells the end of an instance; others are passed over."""

    async def find() -> Observation:
        while True:
            seen = await queue.get()
            if seen.instance_id == instance_id and seen.finished_at is not None:
                return seen

    return await within(find(), what=f"an event tells the end of {instance_id}", timeout_s=30.0)
