"""The event loop on virtual time and the processes on it."""

import asyncio
import random
import time
from contextvars import Context

import pytest

from hvsim.loop import Process, SimLoop, SimulationStuck


def _run(work: object, seed: int = 1) -> object:
    loop = SimLoop(random.Random(seed))
    try:
        return loop.run_until_complete(loop.create_task(work(loop), context=Context()))  # type: ignore[operator]
    finally:
        loop.close()


def test_time_jumps_to_the_next_timer() -> None:
    async def work(loop: SimLoop) -> float:
        await asyncio.sleep(3600)
        return loop.time()

    began = time.monotonic()

    assert _run(work) == 3600
    assert time.monotonic() - began < 60


def test_a_crashed_process_never_runs_again_not_even_its_finally() -> None:
    ran: list[str] = []

    async def victim() -> None:
        try:
            await asyncio.sleep(2)
            ran.append("after")
        finally:
            ran.append("finally")

    async def work(loop: SimLoop) -> None:
        process = Process(loop, "p", "p")
        process.start(victim())
        await asyncio.sleep(1)
        process.crash()
        await asyncio.sleep(10)

    _run(work)

    assert ran == []


def test_a_stopped_process_goes_on_where_it_was() -> None:
    at: list[float] = []

    async def sleeper(loop: SimLoop) -> None:
        await asyncio.sleep(2)
        at.append(loop.time())

    async def work(loop: SimLoop) -> None:
        process = Process(loop, "p", "p")
        process.start(sleeper(loop))
        await asyncio.sleep(1)
        process.pause()
        await asyncio.sleep(10)
        process.resume()
        await asyncio.sleep(1)

    _run(work)

    assert at == [11.0]


def test_processes_are_interleaved_by_the_seed_and_each_keeps_its_order() -> None:
    def order_of(seed: int) -> str:
        order: list[str] = []

        async def work(loop: SimLoop) -> None:
            for name in "ab":
                process = Process(loop, name, name)
                for number in "12":
                    process.later(1.0, lambda what=name + number: order.append(what))  # type: ignore[misc]
            await asyncio.sleep(2)

        _run(work, seed)
        return " ".join(order)

    assert {order_of(seed) for seed in range(20)} == {"a1 a2 b1 b2", "b1 b2 a1 a2"}


def test_waiting_for_nothing_is_told() -> None:
    async def work(_: SimLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimulationStuck, match="nothing is left to happen"):
        _run(work)


def test_spinning_is_told() -> None:
    async def work(_: SimLoop) -> None:
        while True:  # noqa: ASYNC110 (it is the point)
            await asyncio.sleep(0)

    with pytest.raises(SimulationStuck, match="turns at"):
        _run(work)
