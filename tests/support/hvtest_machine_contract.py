"""The Driver contract as machines keep it: what a guest that is no process cannot do is said instead.

A guest has no exit code of its own: it ends (0), or a fault ends it. Its console is a serial line without a size. Its
VMM needs memory beside the guest's, so the limit is above ``spec.memory_mb``.
"""

import pytest

from hvtest_driver_contract import DriverBench, DriverContract
from hvtest_driver_stats import sampled
from hvtest_driver_watching import events_of, the_end
from hypervisor.agent.drivers.driver import Driver
from hypervisor.core.errors import Unimplemented
from hypervisor.core.model import ConsoleSize
from hypervisor.core.states import InstanceStatus

__all__ = ["MachineDriverContract"]

_OVERHEAD_BYTES = 1 << 30


class MachineDriverContract(DriverContract):
    """In the place of :class:`DriverContract`; ``exits(code)`` of the bench with another code than 0 is a fault."""

    async def test_an_exit_with_an_error_is_told_as_failed_with_its_code(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.exits(7))

        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            seen = await the_end(events, assignment.instance_id)

        assert seen.status is InstanceStatus.FAILED
        assert seen.reason in ("CRASHED", "KILLED")
        assert seen.message
        again = await driver.get(assignment.instance_id)
        assert (again.status, again.exit_code) == (InstanceStatus.FAILED, seen.exit_code)

    async def test_an_exit_between_two_agents_is_found_with_its_code(
        self, bench: DriverBench, driver: Driver
    ) -> None:
        assignment = self._assignment(bench, bench.exits(5))
        handle = await driver.create(assignment)
        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            told = await the_end(events, assignment.instance_id)
        await driver.aclose()

        after_restart = await bench.open()
        try:
            adopted = await after_restart.recover(assignment.instance_id, handle)

            assert adopted is not None
            assert (adopted.status, adopted.exit_code) == (InstanceStatus.FAILED, told.exit_code)
        finally:
            await after_restart.delete(assignment.instance_id)
            await after_restart.aclose()

    async def test_a_resize_is_seen_inside(self, bench: DriverBench, driver: Driver, made: list[str]) -> None:
        """It is refused, and the capabilities say so."""
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        console = await driver.attach(assignment.instance_id)
        assert not console.resizable

        with pytest.raises(Unimplemented) as caught:
            await console.resize(ConsoleSize(101, 37))

        assert caught.value.reason == "CAPABILITY_MISSING"
        assert (await driver.info()).lacks("resize") is not None
        await console.close()

    async def test_stats_of_a_running_instance_move_with_time(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        spec = bench.shell()
        assignment = await self._create(bench, driver, made, spec)
        await driver.start(assignment.instance_id)

        first = await sampled(driver, assignment.instance_id)
        second = await sampled(driver, assignment.instance_id)

        guest = spec.memory_mb << 20
        assert first.memory_limit_bytes is not None
        assert guest <= first.memory_limit_bytes <= guest + _OVERHEAD_BYTES
        assert first.memory_used_bytes is not None
        assert 0 < first.memory_used_bytes <= first.memory_limit_bytes
        assert first.cpu_usage_ns is not None
        assert second.cpu_usage_ns is not None
        assert second.cpu_usage_ns >= first.cpu_usage_ns >= 0
        assert second.sampled_at >= first.sampled_at
