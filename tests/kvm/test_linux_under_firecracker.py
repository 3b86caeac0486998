"""Linux guests of the real Firecracker: a whole life, devices, ends of each kind, and that `auto` takes it."""

import os
import re
import signal
from dataclasses import replace as with_config
from pathlib import Path

import pytest
from msgspec.structs import replace

from hvtest_agent_waiting import PATIENCE
from hvtest_driver_stats import sampled
from hvtest_driver_watching import events_of, read_until, the_end
from hvtest_linux_microvms import LinuxFirecrackerBench
from hvtest_microvms import assignment, pid_of
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.agent.drivers.microvm.qemu import QemuVmm
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, NetworkInterface, SnapshotKind, VmmChoice
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(300 * PATIENCE)


async def ready(driver: MicrovmDriver, spec: InstanceSpec) -> str:
    """An instance whose shell takes commands; its id."""
    made = assignment(spec)
    await driver.create(made)
    await start_ready(driver, made.instance_id)
    return made.instance_id


async def start_ready(driver: MicrovmDriver, instance_id: str) -> None:
    await driver.start(instance_id)
    console = await driver.attach(instance_id)
    seen = await read_until(console, b"READY")
    if b"# " not in seen.partition(b"READY")[2]:
        await read_until(console, b"# ")
    await console.close()


async def answer(driver: MicrovmDriver, instance_id: str, command: str) -> str:
    """What the guest's shell prints for a command."""
    console = await driver.attach(instance_id)
    try:
        await console.write(f"echo BEGIN-$((40+1)); {command}; echo END-$((40+2))\n".encode())
        seen = await read_until(console, b"END-42\r\n")
    finally:
        await console.close()
    match = re.search(rb"BEGIN-41\r\n(.*)END-42\r\n", seen, re.DOTALL)
    assert match is not None, seen
    return match[1].decode().replace("\r\n", "\n").strip()


async def test_a_whole_life(node: LinuxFirecrackerBench, micro: MicrovmDriver) -> None:
    instance_id = await ready(
        micro, node.spec(memory_mb=160, disk_gb=1, options=MicrovmOptions(balloon=True))
    )

    # Its hardware.
    assert await answer(micro, instance_id, "cat /sys/block/vda/size") == str((1 << 30) // 512)
    memory = re.search(r"MemTotal: +(\d+) kB", await answer(micro, instance_id, "cat /proc/meminfo"))
    assert memory is not None
    assert 100 << 10 < int(memory[1]) < 160 << 10
    seen = await sampled(micro, instance_id)
    assert seen.cpu_usage_ns is not None
    assert seen.cpu_usage_ns > 0

    # Paused, and on.
    assert (await micro.pause(instance_id)).status is InstanceStatus.PAUSED
    assert (await micro.resume(instance_id)).status is InstanceStatus.RUNNING

    # Snapshots, full and diff, of disk and memory together.
    write = "echo {0} | dd of=/dev/vda conv=fsync 2>/dev/null; word={0}; echo ok"
    read = "echo 3 > /proc/sys/vm/drop_caches; head -c 3 /dev/vda; echo $word"
    assert await answer(micro, instance_id, write.format("one")) == "ok"
    await micro.create_snapshot(instance_id, "one", kind=SnapshotKind.FULL)
    assert await answer(micro, instance_id, write.format("two")) == "ok"
    diff = await micro.create_snapshot(instance_id, "two", kind=SnapshotKind.DIFF)
    assert diff.parent == "one"
    for name in ("one", "two"):
        assert (await micro.restore_snapshot(instance_id, name)).status is InstanceStatus.RUNNING
        assert (await answer(micro, instance_id, read)).split() == [name + name]

    # Put to disk, and on from there.
    assert (await micro.suspend(instance_id)).reason == "SUSPENDED"
    assert "processes" not in node.leftovers()
    assert (await micro.start(instance_id)).status is InstanceStatus.RUNNING
    assert await answer(micro, instance_id, "echo $word") == "two"

    # It ends because it was asked to (Ctrl-Alt-Del), and starts anew with its disk.
    stopped = await micro.stop(instance_id, grace_s=30.0 * PATIENCE)
    assert (stopped.status, stopped.reason, stopped.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)
    await start_ready(micro, instance_id)
    assert await answer(micro, instance_id, read) == "two"


async def test_two_processors_are_two(node: LinuxFirecrackerBench, micro: MicrovmDriver) -> None:
    instance_id = await ready(micro, replace(node.shell(), cpu_millis=2000))

    assert await answer(micro, instance_id, "grep -c ^processor /proc/cpuinfo") == "2"


async def test_a_card_reaches_the_bridge_of_the_node(
    node: LinuxFirecrackerBench, micro: MicrovmDriver, bridge: str
) -> None:
    cards = (NetworkInterface(bridge=bridge),)
    instance_id = await ready(micro, node.spec(networks=cards, arguments="GUEST_IP=10.199.78.2/24"))

    assert "1 packets received" in await answer(micro, instance_id, "ping -c 1 -W 20 10.199.78.1")

    seen = await sampled(micro, instance_id)
    assert seen.network_receive_bytes is not None
    assert seen.network_receive_bytes > 0


async def test_an_agent_that_comes_back_finds_it_where_it_was(
    node: LinuxFirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await ready(micro, node.shell())
    await answer(micro, instance_id, "word=kept")
    pid = pid_of(node, instance_id)
    await micro.aclose()

    other = node.driver()
    try:
        adopted = await other.recover(instance_id, {})
        assert adopted is not None
        assert adopted.status is InstanceStatus.RUNNING
        assert pid_of(node, instance_id) == pid
        assert await answer(other, instance_id, "echo $word") == "kept"
    finally:
        await other.delete(instance_id)
        await other.aclose()


async def test_a_guest_that_switches_itself_off_is_stopped(
    node: LinuxFirecrackerBench, micro: MicrovmDriver
) -> None:
    made = assignment(node.spec(run="echo over"))
    await micro.create(made)

    async with events_of(micro) as events:
        await micro.start(made.instance_id)
        seen = await the_end(events, made.instance_id)

    assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)


async def test_a_killed_vmm_is_told_with_the_reason(
    node: LinuxFirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await ready(micro, node.shell())

    async with events_of(micro) as events:
        os.kill(pid_of(node, instance_id), signal.SIGKILL)
        seen = await the_end(events, instance_id)

    assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "KILLED")


async def test_auto_takes_firecracker_with_the_reason(node: LinuxFirecrackerBench) -> None:
    config = with_config(node.config, kernel=node.kernel, vmm=VmmChoice.AUTO, probe_timeout_s=20.0 * PATIENCE)
    clock = SystemClock()
    vmms = (node.vmm(), QemuVmm(Path("qemu-system-x86_64"), Accelerator.TCG, clock=clock))
    driver = MicrovmDriver(config, vmms, clock=clock, new_id=new_id)
    try:
        instance_id = await ready(driver, node.shell())
        seen = await driver.get(instance_id)
        await driver.delete(instance_id)
    finally:
        await driver.aclose()

    assert seen.runtime.startswith("firecracker ")
    assert "a probe has shown" in seen.runtime_reason
