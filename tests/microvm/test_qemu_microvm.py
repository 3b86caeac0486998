"""MicroVMs in the real QEMU through the driver: a whole life, faults, adoption, network, hostile specifications."""

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from hvtest_agent_waiting import within
from hvtest_driver_stats import sampled
from hvtest_driver_watching import events_of, read_until, the_end
from hvtest_qemu_microvms import QemuBench, lacking, start_ready
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.agent.drivers.microvm.processes import processes_in
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import InvalidArgument, NotFound, Unimplemented
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, NetworkInterface, RateLimit, SnapshotKind, VmmChoice
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceStatus, InstanceType

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

_BRIDGE = f"hvq{os.getpid() % 100_000}"
_ADDRESS = "10.199.77.1"


@pytest.fixture
def bench() -> Iterator[QemuBench]:
    with QemuBench(bridges=(_BRIDGE,)) as bench:
        yield bench


@asynccontextmanager
async def opened(bench: QemuBench) -> AsyncIterator[MicrovmDriver]:
    driver = bench.driver()
    try:
        yield driver
    finally:
        await driver.aclose()


@pytest.fixture
async def driver(bench: QemuBench) -> AsyncIterator[MicrovmDriver]:
    async with opened(bench) as driver:
        yield driver


async def created(driver: MicrovmDriver, spec: InstanceSpec) -> str:
    instance_id = new_id("i")
    await driver.create(
        Assignment(
            instance_id=instance_id,
            name="micro",
            project="default",
            type=InstanceType.MICROVM,
            spec=spec,
        )
    )
    return instance_id


async def answer(driver: MicrovmDriver, instance_id: str, command: str) -> str:
    """What the guest's shell prints for a command; what was printed before is passed over."""
    console = await driver.attach(instance_id)
    try:
        await console.write(f"echo BEGIN-$((40+1)); {command}; echo END-$((40+2))\n".encode())
        seen = await read_until(console, b"END-42\r\n")
        while b"# " not in seen.partition(b"END-42\r\n")[2]:
            seen += await within(console.read(), what=f"the prompt after {seen!r}")
    finally:
        await console.close()
    match = re.search(rb"BEGIN-41\r\n(.*)END-42\r\n", seen, re.DOTALL)
    assert match is not None, seen
    return match[1].decode().replace("\r\n", "\n").strip()


def only_process(bench: QemuBench) -> int:
    (run,) = processes_in((bench.directory,))
    return run.pid


async def test_a_whole_life(bench: QemuBench, driver: MicrovmDriver) -> None:
    spec = bench.spec(
        disk_gb=1, options=MicrovmOptions(balloon=True, disk_limit=RateLimit(operations_per_second=500))
    )
    instance_id = await created(driver, spec)

    started = await start_ready(driver, instance_id)
    assert (started.status, started.runtime.split()[0]) == (InstanceStatus.RUNNING, "qemu")
    assert started.runtime.endswith("(tcg)")
    assert "microvm.vmm is set to it" in started.runtime_reason
    assert await answer(driver, instance_id, "cat /sys/block/vda/size") == str((1 << 30) // 512)
    first = await sampled(driver, instance_id)
    assert (
        await answer(driver, instance_id, "dd if=/dev/zero bs=1M count=20 2>/dev/null | md5sum | wc -l")
        == "1"
    )
    second = await sampled(driver, instance_id)
    assert first.cpu_usage_ns is not None
    assert second.cpu_usage_ns is not None
    assert second.cpu_usage_ns > first.cpu_usage_ns > 1_000_000_000

    # Paused, and on.
    assert (await driver.pause(instance_id)).status is InstanceStatus.PAUSED
    assert (await driver.resume(instance_id)).status is InstanceStatus.RUNNING

    # A snapshot of disk and memory; then both change, and come back together.
    write = "echo {} | dd of=/dev/vda conv=fsync 2>/dev/null; word={}; echo ok"
    read = "head -c 3 /dev/vda; echo $word"
    assert await answer(driver, instance_id, write.format("one", "first")) == "ok"
    kept = await driver.create_snapshot(instance_id, "one", kind=SnapshotKind.FULL)
    assert (kept.memory, kept.parent) == (True, "")
    assert kept.size_bytes is not None
    assert kept.size_bytes > 10 << 20
    assert await answer(driver, instance_id, write.format("two", "second")) == "ok"
    assert await answer(driver, instance_id, read) == "twosecond"
    assert (await driver.restore_snapshot(instance_id, "one")).status is InstanceStatus.RUNNING
    # The guest has the disk's old words in its cache, as they were; a read past it shows the disk itself.
    assert await answer(driver, instance_id, f"echo 3 > /proc/sys/vm/drop_caches; {read}") == "onefirst"
    with pytest.raises(Unimplemented, match="take a full snapshot"):
        await driver.create_snapshot(instance_id, "less", kind=SnapshotKind.DIFF)

    # Put to disk, and on from there.
    suspended = await driver.suspend(instance_id)
    assert (suspended.status, suspended.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
    assert list(processes_in((bench.directory,))) == []
    assert (await driver.start(instance_id)).status is InstanceStatus.RUNNING
    assert await answer(driver, instance_id, "echo $word") == "first"

    # It ends because it was asked to, and starts anew with its disk.
    stopped = await driver.stop(instance_id, grace_s=30.0)
    assert (stopped.status, stopped.reason, stopped.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)
    await start_ready(driver, instance_id)
    assert await answer(driver, instance_id, read) == "one"

    assert await driver.delete(instance_id)
    assert bench.leftovers() == {}


async def test_a_qemu_that_is_killed_is_told_as_failed_with_the_reason(
    bench: QemuBench, driver: MicrovmDriver
) -> None:
    instance_id = await created(driver, bench.shell())
    async with events_of(driver) as events:
        await driver.start(instance_id)

        os.kill(only_process(bench), signal.SIGKILL)
        seen = await within(the_end(events, instance_id), what="the end is told", timeout_s=5.0)

    assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "KILLED", 137)
    assert "SIGKILL" in seen.message
    assert (await driver.start(instance_id)).status is InstanceStatus.RUNNING
    await driver.delete(instance_id)


async def test_another_agent_goes_on_with_a_guest_that_has_noticed_nothing(bench: QemuBench) -> None:
    async with opened(bench) as before:
        instance_id = await created(before, bench.shell())
        started = await start_ready(before, instance_id)
        await answer(before, instance_id, "word=kept; { (sleep 1; echo later) & }")
        pid = only_process(bench)

    async with opened(bench) as after:
        adopted = await after.recover(instance_id, {})
        assert adopted is not None
        assert (adopted.status, adopted.started_at) == (InstanceStatus.RUNNING, started.started_at)
        console = await after.attach(instance_id)
        # Printed while no agent looked, or about to be: it is not lost.
        await read_until(console, b"later\r\n")
        await console.close()
        assert await answer(after, instance_id, "echo $word") == "kept"
        assert only_process(bench) == pid

        # Its end is seen though it is no child of this agent.
        async with events_of(after) as events:
            await after.stop(instance_id, grace_s=30.0)
            await start_ready(after, instance_id)
            await answer(after, instance_id, "true")
            os.kill(only_process(bench), signal.SIGKILL)
            await within(the_end(events, instance_id), what="the end is told", timeout_s=5.0)
        await after.delete(instance_id)
    assert bench.leftovers() == {}


async def test_an_orderly_end_between_two_agents_is_told_as_one(bench: QemuBench) -> None:
    async with opened(bench) as before:
        instance_id = await created(before, bench.shell())
        await start_ready(before, instance_id)
        console = await before.attach(instance_id)
        await console.write(b"sleep 1; exit\n")
        await console.close()
        pid = only_process(bench)
    # Buried as init does it when the agent that started it has died.
    await within(asyncio.to_thread(os.waitpid, pid, 0), what="the guest ends", timeout_s=30.0)

    async with opened(bench) as after:
        found = await after.recover(instance_id, {})

        assert found is not None
        assert (found.status, found.reason, found.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)
        await after.delete(instance_id)


async def test_a_panic_is_told_as_one(bench: QemuBench, driver: MicrovmDriver) -> None:
    instance_id = await created(driver, bench.exits(7))
    async with events_of(driver) as events:
        await driver.start(instance_id)
        seen = await the_end(events, instance_id)

    assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "CRASHED")
    assert "panicked" in seen.message
    await driver.delete(instance_id)


async def test_a_disk_is_made_of_an_image_which_is_left_as_it_is(
    bench: QemuBench, driver: MicrovmDriver
) -> None:
    raw, image = bench.images / "disk.raw", bench.images / "disk.qcow2"
    raw.write_bytes(b"image" + bytes((1 << 20) - 5))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    before = image.read_bytes()
    instance_id = await created(driver, msgspec.structs.replace(bench.spec(disk_gb=1), image=str(image)))
    await start_ready(driver, instance_id)

    assert (
        await answer(driver, instance_id, "head -c 5 /dev/vda; cat /sys/block/vda/size") == f"image{1 << 21}"
    )
    await answer(driver, instance_id, "echo other | dd of=/dev/vda conv=fsync 2>/dev/null")

    await driver.stop(instance_id, grace_s=0.0)
    assert image.read_bytes() == before
    await driver.delete(instance_id)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@pytest.fixture
def bridge() -> Iterator[str]:
    run("ip", "link", "add", _BRIDGE, "type", "bridge")
    try:
        run("ip", "addr", "add", f"{_ADDRESS}/24", "dev", _BRIDGE)
        run("ip", "link", "set", _BRIDGE, "up")
        yield _BRIDGE
    finally:
        run("ip", "link", "del", _BRIDGE)


async def test_a_network_card_reaches_the_bridge_and_goes_with_the_instance(
    bench: QemuBench, driver: MicrovmDriver, bridge: str
) -> None:
    spec = bench.spec(arguments="GUEST_IP=10.199.77.2/24", networks=(NetworkInterface(bridge=bridge),))
    instance_id = await created(driver, spec)
    await start_ready(driver, instance_id)

    reply = await answer(driver, instance_id, f"ping -c 1 -W 10 {_ADDRESS} >/dev/null && echo reached")

    assert reply == "reached"
    assert len(os.listdir(f"/sys/class/net/{bridge}/brif")) == 1
    record = await sampled(driver, instance_id)
    assert record.network_receive_bytes is not None
    assert record.network_receive_bytes > 0
    await driver.delete(instance_id)
    assert os.listdir(f"/sys/class/net/{bridge}/brif") == []


async def test_each_guest_has_a_user_of_its_own(bench: QemuBench, driver: MicrovmDriver) -> None:
    ids = [await created(driver, bench.shell()) for _ in range(2)]
    for instance_id in ids:
        await driver.start(instance_id)

    uids = {os.stat(f"/proc/{run.pid}").st_uid for run in processes_in((bench.directory,))}

    assert len(uids) == 2
    assert min(uids) >= bench.config.first_uid
    for instance_id in ids:
        await driver.delete(instance_id)


Change = Callable[[QemuBench], InstanceSpec]


def with_kernel(text: str) -> Change:
    return lambda bench: InstanceSpec(kernel_path=text.format(images=bench.images), memory_mb=64)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (with_kernel("/etc/shadow"), "spec.kernel_path"),
        (with_kernel("{images}/../../../etc/shadow"), "spec.kernel_path"),
        (with_kernel("{images}/ker\0nel"), "spec.kernel_path"),
        (with_kernel("{images}/outside"), "spec.kernel_path"),
        (with_kernel("{images}/fifo"), "spec.kernel_path"),
        (lambda b: InstanceSpec(kernel_path=str(b.kernel), initrd_path="/etc/shadow"), "spec.initrd_path"),
        (lambda b: InstanceSpec(kernel_path=str(b.kernel), image="/etc/shadow"), "spec.image"),
        (lambda b: InstanceSpec(kernel_path=str(b.kernel), image=f"{b.images}/outside"), "spec.image"),
        (lambda b: b.spec(arguments="a\nb"), "spec.kernel_args"),
        (
            lambda b: b.spec(networks=(NetworkInterface(bridge="eth0,script=/tmp/x"),)),
            "spec.networks[0].bridge",
        ),
        (lambda b: b.spec(options=MicrovmOptions(metadata="{}")), "spec.microvm.metadata"),
    ],
)
async def test_a_hostile_specification_is_refused_by_field_and_leaves_nothing(
    bench: QemuBench, driver: MicrovmDriver, make: Change, field: str
) -> None:
    (bench.images / "outside").symlink_to("/etc/shadow")
    os.mkfifo(bench.images / "fifo")

    with pytest.raises(InvalidArgument) as caught:
        await created(driver, make(bench))

    assert field in [violation.field for violation in caught.value.violations]
    assert bench.leftovers() == {}


async def test_what_is_not_there_is_not_found(bench: QemuBench, driver: MicrovmDriver) -> None:
    spec = InstanceSpec(kernel_path=str(bench.kernel), initrd_path=str(Path(bench.images) / "absent"))

    with pytest.raises(NotFound) as caught:
        await created(driver, spec)

    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert "spec.initrd_path" in caught.value.message


async def test_without_a_wish_the_accelerator_is_one_that_boots_guests_here_and_why_is_told(
    bench: QemuBench,
) -> None:
    config = replace(bench.config, vmm=VmmChoice.AUTO, kernel=bench.kernel)
    vmms = (bench.vmm(Accelerator.KVM), bench.vmm(Accelerator.TCG))
    driver = MicrovmDriver(config, vmms, clock=SystemClock(), new_id=new_id)
    try:
        instance_id = await created(driver, bench.shell())
        seen = await start_ready(driver, instance_id)

        # Either a probe has shown that KVM boots guests, or what keeps it from that is told.
        by_kvm = seen.runtime.endswith("(kvm)")
        assert by_kvm or seen.runtime.endswith("(tcg)")
        assert ("as a probe has shown" in seen.runtime_reason) == by_kvm
        assert by_kvm or "kvm" in seen.runtime_reason
        assert (await driver.info()).available
        await driver.delete(instance_id)
        assert bench.leftovers() == {}
        print(seen.runtime, seen.runtime_reason)
    finally:
        await driver.aclose()
