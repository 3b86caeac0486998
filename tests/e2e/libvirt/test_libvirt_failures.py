"""What the libvirt driver does when QEMU, libvirtd, or its own process ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hvtest_containerd import eventually
from hvtest_containers import until
from hvtest_driver_watching import events_of, the_end
from hvtest_libvirtd import PrivateLibvirtd, qemu_processes
from hvtest_vms import VmBench, answer, ready, started, vm_assignment
from hypervisor.agent.drivers.libvirt import LibvirtDriver
from hypervisor.core.errors import HypervisorError, Unavailable
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(180)


async def until_it_answers(driver: LibvirtDriver, instance_id: str) -> InstanceStatus:
    """The status as soon as libvirt can be asked again."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(Unavailable):
                return (await driver.get(instance_id)).status
            await asyncio.sleep(0.05)


class TestQemu:
    async def test_a_killed_qemu_is_told_as_failed_with_the_reason(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, _ = await ready(driver, bench.spec())

        async with events_of(driver) as events:
            while (await events.get()).instance_id != made.instance_id:
                pass
            killed = time.monotonic()
            os.kill(bench.libvirtd.qemu(made.instance_id), signal.SIGKILL)
            seen = await the_end(events, made.instance_id)

        assert time.monotonic() - killed < 5.0
        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "VMM_DIED", None)
        assert "QEMU" in seen.message
        again = await driver.get(made.instance_id)
        assert (again.status, again.reason, again.finished_at) == (seen.status, seen.reason, seen.finished_at)

    async def test_one_whose_qemu_was_killed_starts_again(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = await started(driver, bench.spec())
        os.kill(bench.libvirtd.qemu(made.instance_id), signal.SIGKILL)

        async def failed() -> bool:
            return (await driver.get(made.instance_id)).status is InstanceStatus.FAILED

        await until(failed, what="the end is seen")

        seen = await driver.start(made.instance_id)

        assert seen.status is InstanceStatus.RUNNING

    async def test_an_instance_somebody_else_paused_or_ended_is_told(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = await started(driver, bench.spec())

        async with events_of(driver) as events:
            while (await events.get()).instance_id != made.instance_id:
                pass
            bench.libvirtd.virsh("suspend", made.instance_id)
            paused = await events.get()
            bench.libvirtd.virsh("destroy", made.instance_id)
            ended = await the_end(events, made.instance_id)

        assert paused.status is InstanceStatus.PAUSED
        assert (ended.status, ended.reason, ended.exit_code) == (InstanceStatus.FAILED, "KILLED", 137)

    async def test_what_the_driver_was_asked_for_is_not_told_again(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = vm_assignment(bench.spec())
        await driver.create(made)

        async with events_of(driver) as events:
            await events.get()
            await driver.start(made.instance_id)
            await driver.pause(made.instance_id)
            await driver.resume(made.instance_id)
            await driver.stop(made.instance_id, grace_s=0.0)
            other = await started(driver, bench.spec())
            bench.libvirtd.virsh("suspend", other.instance_id)
            seen = await asyncio.wait_for(events.get(), 20)

        assert (seen.instance_id, seen.status) == (other.instance_id, InstanceStatus.PAUSED)


class TestLibvirtd:
    async def test_guests_run_on_without_libvirtd_and_the_driver_comes_back_to_it(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        await answer(console, "echo here > /note")
        before = await driver.get(made.instance_id)
        qemu = bench.libvirtd.qemu(made.instance_id)

        bench.libvirtd.kill()

        with pytest.raises(Unavailable) as caught:
            await driver.get(made.instance_id)
        assert caught.value.reason == "DRIVER_UNAVAILABLE"
        assert not (await driver.info()).available
        assert await answer(console, "cat /note") == "here"
        await asyncio.to_thread(bench.libvirtd.start)
        assert await until_it_answers(driver, made.instance_id) is InstanceStatus.RUNNING
        after = await driver.get(made.instance_id)
        assert after.started_at == before.started_at
        assert bench.libvirtd.qemu(made.instance_id) == qemu
        assert (await driver.info()).available
        assert await answer(console, "cat /note") == "here"
        assert (await driver.stop(made.instance_id, grace_s=60.0)).reason == "EXITED"

    async def test_events_go_on_after_a_restart_and_tell_what_happened_meanwhile(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        first, console = await ready(driver, bench.spec())
        second = await started(driver, bench.spec())

        async with events_of(driver) as events:
            for _ in range(2):
                await events.get()
            bench.libvirtd.kill()
            await console.write(b"poweroff -f\n")
            os.kill(bench.libvirtd.qemu(second.instance_id), signal.SIGKILL)
            await asyncio.to_thread(bench.libvirtd.start)
            ends = {}
            while len(ends) < 2:
                seen = await asyncio.wait_for(events.get(), 30)
                if seen.finished_at is not None:
                    ends[seen.instance_id] = seen
            third = await started(driver, bench.spec())
            os.kill(bench.libvirtd.qemu(third.instance_id), signal.SIGKILL)
            later = await the_end(events, third.instance_id)

        assert ends.keys() == {first.instance_id, second.instance_id}
        assert ends[second.instance_id].status is InstanceStatus.FAILED
        assert ends[second.instance_id].message
        assert (later.status, later.reason) == (InstanceStatus.FAILED, "VMM_DIED")

    async def test_a_delete_takes_what_libvirt_left_of_a_qemu_that_ended_without_it(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = await started(driver, bench.spec())
        other = await started(driver, bench.spec())
        bench.libvirtd.kill()
        os.kill(bench.libvirtd.qemu(made.instance_id), signal.SIGKILL)
        eventually(lambda: qemu_processes(f"guest={made.instance_id},") == [], what="QEMU has ended")
        await asyncio.to_thread(bench.libvirtd.start)
        assert await until_it_answers(driver, made.instance_id) is InstanceStatus.FAILED
        groups = bench.libvirtd.control_groups(made.instance_id)
        assert groups != []
        eventually(
            lambda: all(not (group / "cgroup.procs").read_text() for group in groups), what="they are empty"
        )

        assert await driver.delete(made.instance_id)

        assert bench.libvirtd.control_groups(made.instance_id) == []
        logs = {path.name for path in (bench.libvirtd.directory / "log" / "qemu").iterdir()}
        assert f"{made.instance_id}.log" not in logs
        assert f"{other.instance_id}.log" in logs
        assert bench.libvirtd.control_groups(other.instance_id) != []

    async def test_a_libvirtd_that_hangs_holds_up_neither_the_agent_nor_the_call_for_ever(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = await started(driver, bench.spec())
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        bench.libvirtd.freeze()
        try:
            with pytest.raises(HypervisorError) as caught:
                await driver.get(made.instance_id)
        finally:
            bench.libvirtd.thaw()
            ticking.cancel()

        assert caught.value.reason in ("DRIVER_TIMEOUT", "DRIVER_UNAVAILABLE")
        assert ticks > 100
        assert await until_it_answers(driver, made.instance_id) is InstanceStatus.RUNNING

    async def test_a_driver_without_libvirtd_says_so_and_works_once_there_is_one(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        bench.libvirtd.kill()
        fresh = await bench.open()
        try:
            info = await fresh.info()
            assert not info.available
            assert "libvirtd" in info.reason
            with pytest.raises(Unavailable):
                await fresh.create(vm_assignment(bench.spec()))

            await asyncio.to_thread(bench.libvirtd.start)

            assert (await fresh.info()).available
            made = await started(fresh, bench.spec())
            assert (await fresh.get(made.instance_id)).status is InstanceStatus.RUNNING
        finally:
            await fresh.aclose()


class TestInterrupted:
    async def test_a_create_that_is_cancelled_leaves_nothing(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        await driver.info()
        for delay_s in (0.0, 0.01, 0.03, 0.06, 0.1):
            creating = asyncio.ensure_future(driver.create(vm_assignment(bench.spec(disk_gb=1))))
            await asyncio.sleep(delay_s)
            creating.cancel()
            await asyncio.wait({creating})
            if not creating.cancelled():
                # It was faster.
                await driver.delete(creating.result()["domain"])

        assert bench.leftovers() == {}

    async def test_a_half_made_instance_is_deleted_by_its_id(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = vm_assignment(bench.spec())
        directory = bench.data / "instances" / made.instance_id
        await asyncio.to_thread(directory.mkdir, parents=True)

        assert await driver.delete(made.instance_id)

        assert bench.leftovers() == {}

    async def test_a_definition_libvirt_refuses_leaves_nothing(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        # Less than any machine of libvirt's can have.
        with pytest.raises(HypervisorError):
            await driver.create(vm_assignment(bench.spec(memory_mb=0, disk_gb=1)))

        assert bench.leftovers() == {}


_ORPHAN = """
import asyncio, sys, tempfile
from pathlib import Path
from hvtest_libvirtd import PrivateLibvirtd
from hvtest_vms import VmBench, started

async def main(bench):
    driver = await bench.open()
    made = await started(driver, bench.spec())
    print("running", flush=True)
    await asyncio.sleep(600)

with PrivateLibvirtd(Path(sys.argv[1])) as libvirtd:
    asyncio.run(main(VmBench(libvirtd)))
"""


def test_nothing_of_a_private_libvirtd_outlives_a_killed_test() -> None:
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as directory:
        child = subprocess.Popen(
            [sys.executable, "-c", _ORPHAN, directory],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TEST_TMPDIR": directory},
        )
        assert child.stdout is not None
        assert "running" in (line for line in iter(lambda: child.stdout.readline().strip(), ""))
        assert qemu_processes(directory)

        child.kill()
        child.wait()

        eventually(lambda: not qemu_processes(directory), what="QEMU ended with the test")
        PrivateLibvirtd(Path(directory)).sweep_control_groups()
        child.stdout.close()
