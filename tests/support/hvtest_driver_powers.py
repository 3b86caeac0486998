"""What some drivers can do beyond the contract, as tests: every promise of drivers/powers.py, for any driver with it.

Mix one in beside :class:`hvtest_driver_contract.DriverContract` for each power: their fixtures are that one's.
"""

import asyncio

import pytest

from hvtest_driver_contract import DriverBench
from hvtest_driver_stats import sampled
from hvtest_driver_watching import read_until
from hypervisor.agent.drivers.driver import Assignment, Driver
from hypervisor.agent.drivers.powers import Pausing, Snapshotting, Suspending, Updating
from hypervisor.core.errors import FailedPrecondition, NotFound
from hypervisor.core.ids import new_id
from hypervisor.core.machines import SnapshotKind
from hypervisor.core.model import Observation, Sizes
from hypervisor.core.resources import MIB
from hypervisor.core.states import InstanceStatus

__all__ = ["PausingContract", "SnapshottingContract", "SuspendingContract", "UpdatingContract"]

_QUIET_S = 0.3


async def _shell(bench: DriverBench, driver: Driver, made: list[str], *, start: bool = True) -> str:
    instance_id = new_id("i")
    made.append(instance_id)
    await driver.create(
        Assignment(
            instance_id=instance_id,
            name="powers",
            project="default",
            type=bench.kind,
            spec=bench.shell(),
        )
    )
    if start:
        await driver.start(instance_id)
        await _answers(driver, instance_id, "ready")
    return instance_id


async def _answers(driver: Driver, instance_id: str, word: str) -> None:
    """The guest answers what is typed."""
    console = await driver.attach(instance_id)
    await console.write(f"echo {word}\n".encode())
    await read_until(console, f"{word}\r\n".encode(), times=2)
    await console.close()


async def _listed(driver: Driver, instance_id: str) -> Observation:
    return next(seen for seen in await driver.list() if seen.instance_id == instance_id)


class UpdatingContract:
    """Changing how much it has."""

    @pytest.fixture
    async def updating(self, driver: Driver) -> Updating:
        assert isinstance(driver, Updating)
        assert (await driver.info()).lacks("update") is None
        return driver

    async def test_a_new_size_at_rest_is_had_after_the_start(
        self, bench: DriverBench, driver: Driver, updating: Updating, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made, start=False)
        spec = bench.shell()
        sizes = Sizes(cpu_millis=spec.cpu_millis, memory_mb=spec.memory_mb + 32)

        updated = await updating.update(instance_id, sizes)
        again = await updating.update(instance_id, sizes)
        await driver.start(instance_id)

        assert {updated.status, again.status} == {InstanceStatus.STOPPED}
        sample = await sampled(driver, instance_id)
        # A VMM's limit has room for the VMM as well.
        assert sample.memory_limit_bytes is None or sample.memory_limit_bytes >= sizes.memory_mb * MIB
        await _answers(driver, instance_id, "sized")

    async def test_an_unknown_instance_cannot_be_updated(self, driver: Driver, updating: Updating) -> None:
        with pytest.raises(NotFound):
            await updating.update(new_id("i"), Sizes(cpu_millis=1000, memory_mb=64))


class PausingContract:
    """Freezing in memory."""

    @pytest.fixture
    async def pausing(self, driver: Driver) -> Pausing:
        assert isinstance(driver, Pausing)
        assert (await driver.info()).lacks("pause") is None
        return driver

    async def test_a_paused_instance_is_shown_as_paused_and_goes_on_when_resumed(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)

        paused = await pausing.pause(instance_id)
        shown, listed = await driver.get(instance_id), await _listed(driver, instance_id)
        resumed = await pausing.resume(instance_id)

        assert {paused.status, shown.status, listed.status} == {InstanceStatus.PAUSED}
        assert resumed.status is InstanceStatus.RUNNING
        assert resumed.started_at == paused.started_at
        await _answers(driver, instance_id, "again")

    async def test_pause_and_resume_are_idempotent(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)

        assert (await pausing.resume(instance_id)).status is InstanceStatus.RUNNING
        await pausing.pause(instance_id)
        assert (await pausing.pause(instance_id)).status is InstanceStatus.PAUSED

    async def test_a_paused_instance_does_not_answer_and_what_was_typed_is_answered_later(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        console = await driver.attach(instance_id)
        await pausing.pause(instance_id)

        await console.write(b"echo later\n")
        reading = asyncio.ensure_future(read_until(console, b"later\r\n", times=2))
        done, _ = await asyncio.wait({reading}, timeout=_QUIET_S)
        await pausing.resume(instance_id)

        assert not done
        await reading
        await console.close()

    async def test_what_does_not_run_cannot_be_paused_or_resumed(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made, start=False)

        for verb in (pausing.pause, pausing.resume):
            with pytest.raises(FailedPrecondition) as caught:
                await verb(instance_id)
            assert caught.value.reason == "NOT_RUNNING"

    async def test_a_paused_instance_can_be_stopped_and_started(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await pausing.pause(instance_id)

        stopped = await driver.stop(instance_id, grace_s=0.5)
        started = await driver.start(instance_id)

        assert stopped.status is InstanceStatus.STOPPED
        assert started.status is InstanceStatus.RUNNING

    async def test_a_paused_instance_can_be_deleted(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await pausing.pause(instance_id)

        assert await driver.delete(instance_id)

        assert bench.leftovers() == {}

    async def test_another_driver_over_the_runtime_finds_it_paused(
        self, bench: DriverBench, driver: Driver, pausing: Pausing, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await pausing.pause(instance_id)

        other = await bench.open()
        try:
            found = await other.recover(instance_id, {})
            assert isinstance(other, Pausing)
            resumed = await other.resume(instance_id)
        finally:
            await other.aclose()

        assert found is not None
        assert found.status is InstanceStatus.PAUSED
        assert resumed.status is InstanceStatus.RUNNING


class SuspendingContract:
    """Putting memory on disk."""

    @pytest.fixture
    async def suspending(self, driver: Driver) -> Suspending:
        assert isinstance(driver, Suspending)
        assert (await driver.info()).lacks("suspend") is None
        return driver

    async def test_a_suspended_instance_is_stopped_and_goes_on_when_started(
        self, bench: DriverBench, driver: Driver, suspending: Suspending, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)

        suspended = await suspending.suspend(instance_id)
        again = await suspending.suspend(instance_id)
        started = await driver.start(instance_id)

        assert (suspended.status, suspended.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
        assert (again.status, again.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
        assert started.status is InstanceStatus.RUNNING
        await _answers(driver, instance_id, "onward")

    async def test_what_does_not_run_cannot_be_suspended(
        self, bench: DriverBench, driver: Driver, suspending: Suspending, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made, start=False)

        with pytest.raises(FailedPrecondition) as caught:
            await suspending.suspend(instance_id)

        assert caught.value.reason == "NOT_RUNNING"

    async def test_a_suspended_instance_is_deleted_with_its_memory(
        self, bench: DriverBench, driver: Driver, suspending: Suspending, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await suspending.suspend(instance_id)

        assert await driver.delete(instance_id)

        assert bench.leftovers() == {}


class SnapshottingContract:
    """States to go back to."""

    @pytest.fixture
    async def snapshotting(self, driver: Driver) -> Snapshotting:
        assert isinstance(driver, Snapshotting)
        assert (await driver.info()).lacks("snapshot") is None
        return driver

    async def test_a_snapshot_of_a_running_instance_is_gone_back_to_after_a_stop(
        self, bench: DriverBench, driver: Driver, snapshotting: Snapshotting, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)

        kept = await snapshotting.create_snapshot(instance_id, "first", kind=SnapshotKind.FULL)
        shown = await driver.get(instance_id)
        await driver.stop(instance_id, grace_s=0.0)
        restored = await snapshotting.restore_snapshot(instance_id, "first")

        assert (kept.name, kept.kind, kept.memory) == ("first", SnapshotKind.FULL, True)
        assert shown.status is InstanceStatus.RUNNING
        assert restored.status is InstanceStatus.RUNNING
        await _answers(driver, instance_id, "back")

    async def test_snapshots_are_listed_oldest_first_and_made_once(
        self, bench: DriverBench, driver: Driver, snapshotting: Snapshotting, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)

        first = await snapshotting.create_snapshot(instance_id, "first", kind=SnapshotKind.FULL)
        await snapshotting.create_snapshot(instance_id, "second", kind=SnapshotKind.FULL)
        again = await snapshotting.create_snapshot(instance_id, "first", kind=SnapshotKind.FULL)

        listed = await snapshotting.list_snapshots(instance_id)
        assert [kept.name for kept in listed] == ["first", "second"]
        assert again.created_at == first.created_at

    async def test_a_deleted_snapshot_cannot_be_gone_back_to(
        self, bench: DriverBench, driver: Driver, snapshotting: Snapshotting, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await snapshotting.create_snapshot(instance_id, "first", kind=SnapshotKind.FULL)

        assert await snapshotting.delete_snapshot(instance_id, "first")
        assert not await snapshotting.delete_snapshot(instance_id, "first")

        with pytest.raises(NotFound) as caught:
            await snapshotting.restore_snapshot(instance_id, "first")
        assert caught.value.reason == "SNAPSHOT_NOT_FOUND"
        assert (await driver.get(instance_id)).status is InstanceStatus.RUNNING

    async def test_another_driver_over_the_runtime_finds_the_snapshots(
        self, bench: DriverBench, driver: Driver, snapshotting: Snapshotting, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await snapshotting.create_snapshot(instance_id, "first", kind=SnapshotKind.FULL)

        other = await bench.open()
        try:
            await other.recover(instance_id, {})
            assert isinstance(other, Snapshotting)
            found = await other.list_snapshots(instance_id)
        finally:
            await other.aclose()

        assert [kept.name for kept in found] == ["first"]

    async def test_snapshots_go_with_their_instance(
        self, bench: DriverBench, driver: Driver, snapshotting: Snapshotting, made: list[str]
    ) -> None:
        instance_id = await _shell(bench, driver, made)
        await snapshotting.create_snapshot(instance_id, "first", kind=SnapshotKind.FULL)

        await driver.delete(instance_id)

        assert bench.leftovers() == {}
        with pytest.raises(NotFound):
            await snapshotting.list_snapshots(instance_id)
