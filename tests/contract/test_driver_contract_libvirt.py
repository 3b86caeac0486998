"""The libvirt driver over a real, private libvirtd and QEMU: the Driver contract and the driver's powers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_driver_contract import DriverBench, DriverContract
from hvtest_driver_powers import PausingContract, SnapshottingContract, SuspendingContract, UpdatingContract
from hvtest_driver_watching import events_of, the_end
from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_vms import VmBench
from hypervisor.agent.drivers.driver import Driver
from hypervisor.core.errors import Unimplemented
from hypervisor.core.model import ConsoleSize
from hypervisor.core.states import InstanceStatus

pytestmark = [
    pytest.mark.skipif(
        bool(missing_for_libvirt()),
        reason=f"needs {', '.join(missing_for_libvirt())}: tools/setup installs it",
    ),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[PrivateLibvirtd]:
    # Short: sockets are below it, whose paths have at most 107 bytes.
    with PrivateLibvirtd(Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))) as private:
        yield private


class TestDriverContract(
    DriverContract, PausingContract, SuspendingContract, SnapshottingContract, UpdatingContract
):
    @pytest.fixture
    def bench(self, libvirtd: PrivateLibvirtd) -> Iterator[VmBench]:
        bench = VmBench(libvirtd)
        yield bench
        assert bench.leftovers() == {}

    # A machine ends with no number: what a container tells by its exit code, a guest tells by a panic.

    async def test_an_exit_with_an_error_is_told_as_failed_with_its_code(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.exits(7))

        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            seen = await the_end(events, assignment.instance_id)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "GUEST_PANIC", None)
        again = await driver.get(assignment.instance_id)
        assert (again.status, again.reason) == (InstanceStatus.FAILED, "GUEST_PANIC")

    async def test_an_exit_between_two_agents_is_found_with_its_code(
        self, bench: DriverBench, driver: Driver
    ) -> None:
        assignment = self._assignment(bench, bench.exits(5))
        handle = await driver.create(assignment)
        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            await the_end(events, assignment.instance_id)
        await driver.aclose()

        after_restart = await bench.open()
        try:
            adopted = await after_restart.recover(assignment.instance_id, handle)

            assert adopted is not None
            assert (adopted.status, adopted.reason) == (InstanceStatus.FAILED, "GUEST_PANIC")
        finally:
            await after_restart.delete(assignment.instance_id)
            await after_restart.aclose()

    async def test_an_instance_that_exited_starts_again(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.exits(3))
        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            await the_end(events, assignment.instance_id)

            seen = await driver.start(assignment.instance_id)

        assert (seen.status, seen.exit_code) == (InstanceStatus.RUNNING, None)

    # A serial line has no size.

    async def test_a_resize_is_seen_inside(self, bench: DriverBench, driver: Driver, made: list[str]) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        console = await driver.attach(assignment.instance_id)

        assert not console.resizable
        with pytest.raises(Unimplemented, match="serial line"):
            await console.resize(ConsoleSize(101, 37))
        await console.close()
