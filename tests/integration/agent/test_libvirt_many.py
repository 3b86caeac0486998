"""The libvirt driver over libvirt's own test driver (test:///default): many machines, no guests, no rights needed.

That driver keeps its machines in the process's memory for as long as one connection is open.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import libvirt
import pytest

from hvtest_agent_waiting import within
from hvtest_driver_watching import events_of
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.libvirt import LibvirtConfig, LibvirtDriver
from hypervisor.agent.drivers.libvirt.machines import Machines
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, NotFound
from hypervisor.core.ids import new_id
from hypervisor.core.machines import CloudInit, SnapshotKind
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceStatus, InstanceType

MANY = 100
URI = "test:///default"


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[LibvirtDriver]:
    (tmp_path / "kernel").write_bytes(b"a kernel")
    driver = LibvirtDriver(
        LibvirtConfig(uri=URI, data_dir=tmp_path / "data", roots=(tmp_path,)),
        clock=SystemClock(),
        rng=random.Random(7),
    )
    yield driver
    for seen in await driver.list():
        await driver.delete(seen.instance_id)
    await driver.aclose()


def _assignment(tmp_path: Path, **more: object) -> Assignment:
    spec = InstanceSpec(kernel_path=str(tmp_path / "kernel"), memory_mb=32, **more)  # type: ignore[arg-type]
    return Assignment(instance_id=new_id("i"), name="box", project="p", type=InstanceType.VM, spec=spec)


async def test_many_machines_live_and_go(driver: LibvirtDriver, tmp_path: Path) -> None:
    made = [_assignment(tmp_path) for _ in range(MANY)]
    ids = [assignment.instance_id for assignment in made]

    await asyncio.gather(*(driver.create(assignment) for assignment in made))
    started = await asyncio.gather(*(driver.start(instance_id) for instance_id in ids))
    paused = await asyncio.gather(*(driver.pause(instance_id) for instance_id in ids[::2]))
    listed = {seen.instance_id: seen.status for seen in await driver.list()}
    stopped = await asyncio.gather(*(driver.stop(instance_id, grace_s=0.0) for instance_id in ids))
    deleted = await asyncio.gather(*(driver.delete(instance_id) for instance_id in ids))

    assert {seen.status for seen in started} == {InstanceStatus.RUNNING}
    assert {seen.status for seen in paused} == {InstanceStatus.PAUSED}
    assert listed == {
        instance_id: InstanceStatus.RUNNING if index % 2 else InstanceStatus.PAUSED
        for index, instance_id in enumerate(ids)
    }
    assert {(seen.status, seen.exit_code) for seen in stopped} == {(InstanceStatus.STOPPED, 137)}
    assert all(deleted)
    assert await driver.list() == ()
    assert list((tmp_path / "data" / "instances").iterdir()) == []
    assert list((tmp_path / "data" / "consoles").iterdir()) == []


async def test_the_machine_that_libvirt_brings_itself_is_left_alone(driver: LibvirtDriver) -> None:
    await driver.info()

    assert await driver.list() == ()
    assert not await driver.delete("test")
    with pytest.raises(NotFound):
        await driver.get("test")


async def test_suspend_and_snapshots(driver: LibvirtDriver, tmp_path: Path) -> None:
    made = _assignment(tmp_path, disk_gb=1, cloud_init=CloudInit())
    await driver.create(made)
    await driver.start(made.instance_id)

    suspended = await driver.suspend(made.instance_id)
    resumed = await driver.start(made.instance_id)
    kept = await driver.create_snapshot(made.instance_id, "first", kind=SnapshotKind.FULL)
    child = await driver.create_snapshot(made.instance_id, "second", kind=SnapshotKind.FULL)
    listed = await driver.list_snapshots(made.instance_id)
    restored = await driver.restore_snapshot(made.instance_id, "first")
    gone = await driver.delete_snapshot(made.instance_id, "second")

    assert (suspended.status, suspended.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
    assert resumed.status is InstanceStatus.RUNNING
    assert (kept.parent, child.parent) == ("", "first")
    assert [(one.name, one.current) for one in listed] == [("first", False), ("second", True)]
    assert restored.status is InstanceStatus.RUNNING
    assert gone


async def test_ends_are_told_as_they_happen(driver: LibvirtDriver, tmp_path: Path) -> None:
    made = [_assignment(tmp_path) for _ in range(20)]
    for assignment in made:
        await driver.create(assignment)

    async with events_of(driver) as events:
        for assignment in made:
            await events.get()
            await driver.start(assignment.instance_id)
        other = libvirt.open(URI)
        for assignment in made:
            other.lookupByName(assignment.instance_id).shutdown()
        ends = {}
        while len(ends) < len(made):
            seen = await within(events.get(), what="the next end is told")
            if seen.finished_at is not None:
                ends[seen.instance_id] = (seen.status, seen.reason)
        other.close()

    assert set(ends) == {assignment.instance_id for assignment in made}
    assert set(ends.values()) == {(InstanceStatus.STOPPED, "EXITED")}


async def test_the_driver_says_that_no_guests_are_run(driver: LibvirtDriver, tmp_path: Path) -> None:
    made = _assignment(tmp_path)
    await driver.create(made)

    info = await driver.info()
    seen = await driver.get(made.instance_id)

    assert info.available
    assert "test driver" in info.reason
    assert "test driver" in seen.runtime_reason
    with pytest.raises(FailedPrecondition):
        await driver.attach(made.instance_id)


async def test_a_guest_that_misses_the_power_button_is_asked_anew(
    driver: LibvirtDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypervisor.agent.drivers.libvirt.driver.ASK_AGAIN_S", 0.3)
    press = Machines.press_power_button
    pressed = 0

    async def missed_at_first(machines: Machines, instance_id: str) -> None:
        nonlocal pressed
        pressed += 1
        if pressed == 3:
            await press(machines, instance_id)

    monkeypatch.setattr(Machines, "press_power_button", missed_at_first)
    asked = _assignment(tmp_path)
    await driver.create(asked)
    await driver.start(asked.instance_id)

    stopped = await driver.stop(asked.instance_id, grace_s=60.0)

    assert (stopped.status, stopped.reason, pressed) == (InstanceStatus.STOPPED, "EXITED", 3)


async def test_bases_that_no_machine_uses_are_collected(driver: LibvirtDriver, tmp_path: Path) -> None:
    images = [tmp_path / f"disk-{number}" for number in range(3)]
    made = []
    for number, image in enumerate(images):
        image.write_bytes(bytes([number]) * 4096)
        made.append(_assignment(tmp_path, image=str(image)))
        await driver.create(made[-1])
    bases = tmp_path / "data" / "bases"
    before = {path.name for path in bases.iterdir()}
    # Deleted a moment after its base was taken over: the base may be just about to be used again.
    await driver.delete(made[0].instance_id)
    # Unknown to libvirt, with the overlay still there.
    await driver._machines.undefine(made[1].instance_id)
    assert {path.name for path in bases.iterdir()} == before

    for path in bases.iterdir():
        os.utime(path, (0, 0))
    await driver.collect()

    left = {path.name for path in bases.iterdir()}
    assert len(before) == 4
    assert len(before - left) == 1
    assert {path.read_bytes()[0] for path in bases.glob("*.raw")} == {1, 2}
    await driver.delete(made[1].instance_id)
    await driver.delete(made[2].instance_id)
    assert [path.suffix for path in bases.iterdir()] == []
