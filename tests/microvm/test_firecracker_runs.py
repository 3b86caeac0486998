"""Runs of the real Firecracker: the guest's hardware, its console, its end however it comes, and the jail."""

import asyncio
import os
import signal
import stat
import subprocess
from dataclasses import replace as with_fields
from pathlib import Path

import pytest
from msgspec.structs import replace

from hvtest_driver_stats import sampled
from hvtest_driver_watching import events_of, read_until, the_end
from hvtest_microvms import (
    FIRECRACKER,
    JAILER,
    FirecrackerBench,
    answer,
    assignment,
    pid_of,
    root_of,
    started,
)
from hypervisor.agent.drivers.microvm import FirecrackerVmm, MicrovmDriver
from hypervisor.agent.drivers.microvm.processes import end_now
from hypervisor.agent.drivers.microvm.records import RecordStore
from hypervisor.agent.drivers.microvm.vmm import Machine
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, RateLimit, SnapshotKind
from hypervisor.core.model import Sizes
from hypervisor.core.states import InstanceStatus


def qcow2_of(node: FirecrackerBench, data: bytes) -> Path:
    """A compressed image of a disk with the data."""
    raw, image = node.images / "raw", node.images / "image.qcow2"
    raw.write_bytes(data)
    words = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(image)]
    subprocess.run(words, check=True, timeout=60)
    return image


async def test_the_guest_has_the_memory_and_the_arguments_of_its_specification(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, replace(node.spec(memory_mb=96), kernel_args="role=web quiet"))

    memory = await answer(micro, instance_id, "mem", "MEM 98304\r\n")
    arguments = await answer(micro, instance_id, "args", "role=web quiet")

    assert "MEM 98304" in memory
    assert "console=ttyS0" in arguments


async def test_the_disk_is_the_instances_own_and_outlives_a_stop(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    base = node.images / "base.raw"
    base.write_bytes(b"from the image".ljust(1 << 20, b"\0"))
    spec = replace(node.spec(disk_gb=1), image=str(base))
    first, second = await started(micro, spec), await started(micro, spec)

    await answer(micro, first, "r", "DISK from the image\r\n")
    await answer(micro, first, "w mine", "WRITTEN\r\n")
    await micro.restart(first, grace_s=0.0)

    await answer(micro, first, "r", "DISK mine\r\n")
    await answer(micro, second, "r", "DISK from the image\r\n")
    assert base.read_bytes().startswith(b"from the image\0")
    assert (root_of(node, first) / "disk.raw").stat().st_size == 1 << 30


async def test_a_qcow2_image_becomes_a_raw_disk_of_the_size_asked_for(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    image = qcow2_of(node, b"from the qcow2".ljust(1 << 20, b"\0"))

    instance_id = await started(micro, replace(node.spec(disk_gb=1), image=str(image)))

    await answer(micro, instance_id, "r", "DISK from the qcow2\r\n")
    disk = (root_of(node, instance_id) / "disk.raw").stat()
    assert disk.st_size == 1 << 30
    assert disk.st_blocks * 512 < 1 << 20


async def test_a_qcow2_image_that_is_broken_inside_is_refused(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    image = qcow2_of(node, os.urandom(1 << 20))
    data = bytearray(image.read_bytes())
    # Tables of clusters that lead nowhere.
    data[0x30000:0x50000] = os.urandom(0x20000)
    image.write_bytes(data)

    with pytest.raises(InvalidArgument) as caught:
        await micro.create(assignment(replace(node.spec(), image=str(image))))

    assert (caught.value.reason, caught.value.metadata["field"]) == ("IMAGE_INVALID", "spec.image")
    assert node.leftovers() == {}


async def test_the_last_microvm_takes_its_control_groups_along(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.delete(instance_id)

    assert not list(node.config.cgroup_root.glob(f"*/{node.config.cgroup}"))


async def test_a_running_guest_gets_another_share_of_the_processors_and_nothing_else(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    spec = node.shell()
    instance_id = await started(micro, spec)

    seen = await micro.update(instance_id, Sizes(cpu_millis=250, memory_mb=spec.memory_mb))
    with pytest.raises(FailedPrecondition, match="fixed while it runs") as refused:
        await micro.update(instance_id, Sizes(cpu_millis=250, memory_mb=spec.memory_mb + 8))

    assert seen.status is InstanceStatus.RUNNING
    assert refused.value.reason == "UPDATE_REFUSED"
    assert node.cpu_limits(instance_id) == {(25_000, 100_000)}
    await micro.restart(instance_id, grace_s=0.0)
    assert node.cpu_limits(instance_id) == {(25_000, 100_000)}


async def test_kept_memory_is_in_the_way_of_other_sizes(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    spec = node.shell()
    instance_id = await started(micro, spec)
    wanted = Sizes(cpu_millis=spec.cpu_millis, memory_mb=spec.memory_mb + 8)
    await micro.suspend(instance_id)
    with pytest.raises(FailedPrecondition, match="on disk"):
        await micro.update(instance_id, wanted)
    await micro.start(instance_id)
    await micro.create_snapshot(instance_id, "kept", kind=SnapshotKind.FULL)
    await micro.stop(instance_id, grace_s=0.0)
    with pytest.raises(FailedPrecondition, match="snapshots"):
        await micro.update(instance_id, wanted)

    await micro.delete_snapshot(instance_id, "kept")
    await micro.update(instance_id, wanted)
    await micro.start(instance_id)

    assert f"MEM {wanted.memory_mb * 1024}" in await answer(
        micro, instance_id, "mem", f"MEM {wanted.memory_mb * 1024}\r\n"
    )


async def test_a_guest_that_hears_is_stopped_politely(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "echo up", "up\r\nup\r\n")
    console = await micro.attach(instance_id)

    stopped = await micro.stop(instance_id, grace_s=20.0)

    assert (stopped.status, stopped.reason, stopped.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)
    await read_until(console, b"BYE\r\n")


async def test_a_guest_that_ends_while_its_vmm_no_more_answers_has_ended_by_itself(
    node: FirecrackerBench,
) -> None:
    class Ending(FirecrackerVmm):
        """Its socket is gone a moment before it is."""

        async def ask_to_stop(self, machine: Machine) -> bool:
            await super().ask_to_stop(machine)
            raise Unavailable("connection refused", reason="VMM_UNREACHABLE")

    vmm = Ending(FIRECRACKER, jailer=JAILER, clock=SystemClock())
    driver = MicrovmDriver(node.config, (vmm,), clock=SystemClock(), new_id=new_id)
    instance_id = await started(driver, node.shell())
    await answer(driver, instance_id, "echo up", "up\r\nup\r\n")

    stopped = await driver.stop(instance_id, grace_s=20.0)
    await driver.delete(instance_id)
    await driver.aclose()

    assert (stopped.status, stopped.reason, stopped.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)


async def test_a_guest_that_does_not_hear_at_first_is_asked_anew(
    node: FirecrackerBench, micro: MicrovmDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypervisor.agent.drivers.microvm.driver.ASK_AGAIN_S", 0.3)
    ask = FirecrackerVmm.ask_to_stop
    asked = 0

    async def missed_at_first(vmm: FirecrackerVmm, machine: Machine) -> bool:
        nonlocal asked
        asked += 1
        return True if asked < 3 else await ask(vmm, machine)

    monkeypatch.setattr(FirecrackerVmm, "ask_to_stop", missed_at_first)
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "echo up", "up\r\nup\r\n")

    stopped = await micro.stop(instance_id, grace_s=20.0)

    assert (stopped.status, stopped.reason, asked) == (InstanceStatus.STOPPED, "EXITED", 3)


async def test_a_guest_that_is_deaf_is_ended_by_force_after_its_grace(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "deaf", "DEAF\r\n")

    stopped = await micro.stop(instance_id, grace_s=0.3)

    assert (stopped.status, stopped.reason, stopped.exit_code) == (InstanceStatus.STOPPED, "KILLED", 137)


async def test_a_killed_vmm_is_told_at_once_as_failed_with_the_reason(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())

    async with events_of(micro) as events:
        os.kill(pid_of(node, instance_id), signal.SIGKILL)
        async with asyncio.timeout(5.0):
            seen = await the_end(events, instance_id)

    assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "KILLED", 137)
    assert "SIGKILL" in seen.message
    # Its socket was left behind, and is in nobody's way.
    assert stat.S_ISSOCK((root_of(node, instance_id) / "api.sock").stat().st_mode)
    assert (await micro.start(instance_id)).status is InstanceStatus.RUNNING
    await answer(micro, instance_id, "echo again", "again\r\nagain\r\n")


async def test_an_agent_that_comes_back_sees_the_death_it_missed(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.aclose()
    os.kill(pid_of(node, instance_id), signal.SIGKILL)

    other = node.driver()
    async with events_of(other) as events:
        seen = await other.recover(instance_id, {})
        assert seen is not None
        if seen.finished_at is None:
            # The signal was still on its way.
            seen = await the_end(events, instance_id)
    await other.aclose()

    assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "KILLED")
    assert seen.finished_at is not None


async def test_a_run_before_the_nodes_restart_is_told_as_that(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.aclose()
    assert end_now(pid_of(node, instance_id), timeout_s=10.0)
    store = RecordStore(node.config.data_dir)
    (record,) = store.load()
    assert record.run is not None
    # A process has its number by now: this one.
    store.save(replace(record, run=with_fields(record.run, pid=os.getpid(), boot_id="an earlier one")))

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "NODE_RESTARTED")
    assert (await other.start(instance_id)).status is InstanceStatus.RUNNING
    await other.delete(instance_id)
    await other.aclose()


async def test_a_process_that_has_the_number_of_a_run_by_now_is_left_alone(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.aclose()
    assert end_now(pid_of(node, instance_id), timeout_s=10.0)
    store = RecordStore(node.config.data_dir)
    (record,) = store.load()
    assert record.run is not None
    store.save(replace(record, run=with_fields(record.run, pid=os.getpid())))

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert (seen.status, seen.reason) == (InstanceStatus.FAILED, "KILLED")
    assert await other.delete(instance_id)
    await other.aclose()


async def test_an_adopted_guest_goes_on_where_it_was_and_its_end_is_told_with_its_code(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    pid = pid_of(node, instance_id)
    await micro.aclose()

    other = node.driver()
    try:
        adopted = await other.recover(instance_id, {})
        assert adopted is not None
        assert adopted.status is InstanceStatus.RUNNING
        assert pid_of(node, instance_id) == pid
        await answer(other, instance_id, "m", "COUNT 2\r\n")
        # Its exit code is in its log alone: it is not this agent's child.
        async with events_of(other) as events:
            console = await other.attach(instance_id)
            await console.write(b"q\n")
            seen = await the_end(events, instance_id)
            await console.close()
        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)
    finally:
        await other.delete(instance_id)
        await other.aclose()


async def test_output_while_no_agent_is_there_is_read_by_the_next(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    console = await micro.attach(instance_id)
    await read_until(console, b"HELLO")
    await console.write(b"echo while you were away\n")
    await micro.aclose()

    other = node.driver()
    await other.recover(instance_id, {})
    console = await other.attach(instance_id)
    await read_until(console, b"while you were away\r\n", times=1)
    await console.close()
    await other.delete(instance_id)
    await other.aclose()


async def test_the_jail_has_a_user_of_its_own_and_shows_nothing_of_the_node(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    first, second = await started(micro, node.shell()), await started(micro, node.shell())
    proc = [Path("/proc") / str(pid_of(node, instance_id)) for instance_id in (first, second)]

    uids = [
        next(line.split()[1:] for line in (p / "status").read_text().splitlines() if line.startswith("Uid:"))
        for p in proc
    ]
    networks = {os.readlink(p / "ns/net") for p in proc}
    interfaces = [line.split(":")[0].strip() for line in (proc[0] / "net/dev").read_text().splitlines()[2:]]

    assert all(len(set(ids)) == 1 and int(ids[0]) >= node.config.first_uid for ids in uids)
    assert uids[0] != uids[1]
    assert len(networks | {os.readlink("/proc/self/ns/net")}) == 3
    assert "eth0" not in interfaces
    assert not (proc[0] / "root/etc").exists()
    assert (proc[0] / "root/kernel").stat().st_uid == int(uids[0][0])
    assert (proc[0] / "stat").read_text().split()[5] == proc[0].name, "it leads no session of its own"


async def test_each_vmm_has_a_control_group_with_its_limits(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, replace(node.spec(memory_mb=80), cpu_millis=500))

    seen = await sampled(micro, instance_id)

    assert seen.memory_limit_bytes == (80 + 48) << 20
    text = (Path("/proc") / str(pid_of(node, instance_id)) / "cgroup").read_text()
    assert f"/{node.config.cgroup}/{instance_id}" in text


async def test_metrics_of_the_vmm_are_told(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "echo counted", "counted\r\ncounted\r\n")
    vmm = node.vmm()
    machine = micro.machine(instance_id)

    first = await vmm.metrics(machine)
    second = await vmm.metrics(machine)

    assert first["uart"]["write_count"] > 0
    assert second["utc_timestamp_ms"] >= first["utc_timestamp_ms"]


async def test_every_device_of_the_options_is_there(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    options = MicrovmOptions(
        vsock=True,
        balloon=True,
        disk_limit=RateLimit(bytes_per_second=1 << 20, operations_per_second=100),
    )
    instance_id = await started(micro, node.spec(disk_gb=1, options=options))

    shown = await node.vmm().configuration(micro.machine(instance_id))

    assert shown["vsock"]["guest_cid"] == 3
    assert shown["balloon"]["deflate_on_oom"] is True
    limiter = shown["drives"][0]["rate_limiter"]
    assert (limiter["bandwidth"]["size"], limiter["ops"]["size"]) == (1 << 20, 100)
    assert "entropy" in shown
    assert (root_of(node, instance_id) / "vsock.sock").exists()
    # A start again meets the socket that the run before has left.
    await micro.restart(instance_id, grace_s=0.0)
    await answer(micro, instance_id, "echo again", "again\r\nagain\r\n")


async def test_fifty_at_once_are_all_there(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    made = [assignment(node.spec(memory_mb=32)) for _ in range(50)]

    async def one(index: int) -> None:
        await micro.create(made[index])
        await micro.start(made[index].instance_id)

    async with asyncio.TaskGroup() as group:
        for index in range(len(made)):
            group.create_task(one(index))
    async with asyncio.TaskGroup() as group:
        for index, each in enumerate(made):
            group.create_task(answer(micro, each.instance_id, f"echo i am {index}", f"\r\ni am {index}\r\n"))

    assert {seen.status for seen in await micro.list()} == {InstanceStatus.RUNNING}
    assert len({pid_of(node, each.instance_id) for each in made}) == 50


async def test_a_vmm_that_cannot_be_run_says_why_and_leaves_nothing(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    made = assignment(node.shell())
    await micro.create(made)
    (root_of(node, made.instance_id) / "kernel").unlink()

    with pytest.raises(FailedPrecondition) as caught:
        await micro.start(made.instance_id)

    assert caught.value.reason == "VMM_REFUSED"
    assert "boot-source" in caught.value.message
    assert (await micro.get(made.instance_id)).status is InstanceStatus.STOPPED
    left = node.leftovers()
    assert "processes" not in left
    assert "control groups" not in left


@pytest.mark.parametrize(
    "known", [False, True], ids=["before it recorded the process", "before its guest ran"]
)
async def test_a_start_that_the_agent_did_not_survive_is_begun_anew(
    node: FirecrackerBench, micro: MicrovmDriver, known: bool
) -> None:
    instance_id = await started(micro, node.shell())
    stray = pid_of(node, instance_id)
    await micro.aclose()
    store = RecordStore(node.config.data_dir)
    (record,) = store.load()
    store.save(replace(record, run=record.run if known else None, starting=True, started_at=None))

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert (seen.status, seen.started_at) == (InstanceStatus.STOPPED, None)
    await other.start(instance_id)

    assert pid_of(node, instance_id) != stray
    assert stray not in {run.pid for run in node.processes()}
    await answer(other, instance_id, "echo anew", "anew\r\nanew\r\n")
    await other.delete(instance_id)
    await other.aclose()


async def test_what_a_start_that_was_cut_off_left_goes_with_the_instance(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.aclose()
    store = RecordStore(node.config.data_dir)
    (record,) = store.load()
    store.save(replace(record, run=None, starting=True, started_at=None))

    other = node.driver()
    assert await other.delete(instance_id)
    await other.aclose()

    assert node.leftovers() == {}


async def test_a_log_that_grows_is_cut_and_still_tells_the_end(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    """A guest can make its VMM complain as often as it likes."""
    instance_id = await started(micro, node.spec(disk_gb=1))
    await answer(micro, instance_id, "noise 40000", "QUIET\r\n")
    log = root_of(node, instance_id) / "vmm.log"
    before = log.stat().st_blocks * 512

    await micro.trim_logs(most_bytes=1 << 20)

    assert before > 1 << 20
    assert log.stat().st_blocks * 512 < 1 << 16
    await micro.aclose()
    other = node.driver()
    async with events_of(other) as events:
        await other.recover(instance_id, {})
        console = await other.attach(instance_id)
        await console.write(b"q\n")
        seen = await the_end(events, instance_id)
        await console.close()
    assert (seen.reason, seen.exit_code) == ("EXITED", 0)
    await other.delete(instance_id)
    await other.aclose()
