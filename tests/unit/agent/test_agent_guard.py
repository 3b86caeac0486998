"""Containment of driver faults."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from hvtest_agent_waiting import within
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import DeadlineExceeded, Internal, NotFound
from hypervisor.core.model import Observation

QUICK = DriverDeadlines(create_s=0.05, action_s=0.05, query_s=0.05, abandon_s=0.05)


class Driver(FakeDriver):
    """Faults that the fake driver is too well-behaved for."""

    def __init__(self) -> None:
        super().__init__(FakeConfig(), clock=SystemClock())
        self.released = asyncio.Event()

    async def get(self, instance_id: str) -> Observation:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                continue  # The worst there is: it does not even react to being cancelled.
        raise KeyError(instance_id)

    async def list(self) -> tuple[Observation, ...]:
        raise asyncio.CancelledError


@pytest.fixture
async def driver() -> AsyncIterator[Driver]:
    driver = Driver()
    yield driver
    driver.released.set()
    await driver.aclose()


async def test_errors_of_the_tree_pass(driver: Driver) -> None:
    with pytest.raises(NotFound) as caught:
        await GuardedDriver(driver, deadlines=QUICK).start("i-1")

    assert caught.value.reason == "INSTANCE_NOT_FOUND"


async def test_any_other_exception_becomes_internal_with_its_cause(driver: Driver) -> None:
    cause = ZeroDivisionError("oops")
    driver.faults.fail("start", cause)

    with pytest.raises(Internal) as caught:
        await GuardedDriver(driver, deadlines=QUICK).start("i-1")

    assert caught.value.reason == "DRIVER_DEFECT"
    assert caught.value.__cause__ is cause


async def test_a_hanging_call_ends_at_its_deadline(driver: Driver) -> None:
    driver.faults.hang("start")

    with pytest.raises(DeadlineExceeded) as caught:
        await within(GuardedDriver(driver, deadlines=QUICK).start("i-1"), what="the deadline", timeout_s=2.0)

    assert caught.value.reason == "DRIVER_TIMEOUT"
    assert caught.value.metadata == {"driver": "fake", "verb": "start"}


async def test_a_call_that_ignores_being_cancelled_is_left_behind(driver: Driver) -> None:
    with pytest.raises(DeadlineExceeded):
        await within(GuardedDriver(driver, deadlines=QUICK).get("i-1"), what="the deadline", timeout_s=2.0)


async def test_a_driver_that_cancels_itself_does_not_cancel_its_caller(driver: Driver) -> None:
    with pytest.raises(Internal):
        await GuardedDriver(driver, deadlines=QUICK).list()


async def test_cancelling_the_caller_cancels_the_call(driver: Driver) -> None:
    driver.faults.hang("start")
    guarded = GuardedDriver(driver, deadlines=DriverDeadlines())
    calling = asyncio.ensure_future(guarded.start("i-1"))
    await asyncio.sleep(0)

    calling.cancel()

    await within(asyncio.wait({calling}), what="the call ends", timeout_s=2.0)
    assert calling.cancelled()


async def test_a_stop_may_take_its_grace_on_top_of_the_deadline(driver: Driver) -> None:
    driver.faults.delay("stop", 0.1)

    with pytest.raises(NotFound):
        await GuardedDriver(driver, deadlines=QUICK).stop("i-1", grace_s=1.0)
