"""Two agents, each with its own data directory, on one libvirt: neither sees, adopts or harms what is the other's."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from hvtest_agent_waiting import within
from hvtest_driver_watching import events_of
from hvtest_vms import VmBench, answer, ready, started, vm_assignment
from hypervisor.agent.drivers.libvirt import LibvirtDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import AlreadyExists, NotFound
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def other(bench: VmBench, tmp_path: Path) -> AsyncIterator[LibvirtDriver]:
    """The driver of another agent."""
    data = bench.libvirtd.directory / "other"
    driver = LibvirtDriver(replace(bench.config(), data_dir=data), clock=SystemClock(), rng=Random(11))
    yield driver
    for seen in await driver.list():
        await driver.delete(seen.instance_id)
    await driver.aclose()
    assert not list((data / "instances").glob("*"))


async def _paused(queue: "asyncio.Queue[Observation]") -> set[str]:
    """The instances that events tell of, up to one that is paused."""
    seen = set()
    while True:
        observation = await within(queue.get(), what="a guest is paused", timeout_s=30.0)
        seen.add(observation.instance_id)
        if observation.status is InstanceStatus.PAUSED:
            return seen


async def test_a_running_guest_is_not_touched_by_the_other_agent(
    bench: VmBench, driver: LibvirtDriver, other: LibvirtDriver
) -> None:
    made, console = await ready(driver, bench.spec(disk_gb=1))
    await answer(console, "echo here > /note")
    qemu = bench.libvirtd.qemu(made.instance_id)
    definition = bench.libvirtd.virsh("dumpxml", "--inactive", made.instance_id).stdout
    disk = bench.data / "instances" / made.instance_id / "disk.qcow2"

    # As an agent does that starts, that is told of what it knows not, and that tidies up.
    assert await other.list() == ()
    assert await other.recover(made.instance_id, {}) is None
    assert await other.delete(made.instance_id) is False
    for verb in (other.get, other.start, other.pause, other.suspend):
        with pytest.raises(NotFound) as missing:
            await verb(made.instance_id)
        assert missing.value.reason == "INSTANCE_NOT_FOUND"
    with pytest.raises(NotFound):
        await other.stop(made.instance_id, grace_s=0.0)
    with pytest.raises(AlreadyExists) as refused:
        await other.create(vm_assignment(bench.spec(), instance_id=made.instance_id))
    assert refused.value.reason == "DOMAIN_NOT_OURS"
    assert made.instance_id in refused.value.message

    assert bench.libvirtd.qemu(made.instance_id) == qemu
    assert bench.libvirtd.virsh("dumpxml", "--inactive", made.instance_id).stdout == definition
    assert disk.exists()
    assert await answer(console, "cat /note") == "here"


async def test_each_tells_the_events_of_its_own_alone(
    bench: VmBench, driver: LibvirtDriver, other: LibvirtDriver
) -> None:
    async with events_of(driver) as ours, events_of(other) as theirs:
        first = await started(driver, bench.spec())
        second = await started(other, bench.spec())
        for made in (first, second):
            bench.libvirtd.virsh("suspend", made.instance_id)
        seen = [await _paused(queue) for queue in (ours, theirs)]

        assert seen == [{first.instance_id}, {second.instance_id}]
    assert [(o.instance_id, o.status) for o in await driver.list()] == [
        (first.instance_id, InstanceStatus.PAUSED)
    ]
    # What the first removes takes nothing of the second's along.
    assert await driver.delete(first.instance_id)
    assert (await other.resume(second.instance_id)).status is InstanceStatus.RUNNING


async def test_a_domain_that_somebody_made_by_hand_is_not_replaced(
    bench: VmBench, driver: LibvirtDriver, tmp_path: Path
) -> None:
    made = vm_assignment(bench.spec())
    document = tmp_path / "hand.xml"
    document.write_text(
        f"<domain type='qemu'><name>{made.instance_id}</name><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    bench.libvirtd.virsh("define", str(document))
    try:
        with pytest.raises(AlreadyExists) as refused:
            await driver.create(made)
        assert not await driver.delete(made.instance_id)
        assert made.instance_id in bench.libvirtd.virsh("list", "--all", "--name").stdout
    finally:
        bench.libvirtd.virsh("undefine", made.instance_id)

    assert refused.value.reason == "DOMAIN_NOT_OURS"
