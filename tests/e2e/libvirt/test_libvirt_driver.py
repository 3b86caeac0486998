"""The libvirt driver over a real libvirtd and QEMU: what is its own beyond the Driver contract."""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvtest_containers import until
from hvtest_disk_images import qemu_img
from hvtest_driver_stats import sampled
from hvtest_driver_watching import read_until
from hvtest_vms import MEMORY_MB, VmBench, answer, ready, started, vm_assignment
from hypervisor.agent.drivers.driver import Console
from hypervisor.agent.drivers.libvirt import LibvirtDriver
from hypervisor.core.errors import AlreadyExists, FailedPrecondition
from hypervisor.core.machines import CloudInit, Firmware, SnapshotKind, VmOptions
from hypervisor.core.model import InstanceSpec, Sizes
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20


@pytest.fixture
def base(bench: VmBench) -> Path:
    """A raw disk image with words in its first sector."""
    path = bench.images / "base.raw"
    path.write_bytes(b"from the image".ljust(4 * MIB, b"\0"))
    return path


def boot_sector(words: str) -> bytes:
    """A disk that prints the words on the first serial port when it is booted, and then halts."""
    # cli; ax = ds = 0; si = text; dx = 0x3f8; cld; next: lodsb; test al, al; jz end; out dx, al; jmp next; end: hlt
    code = bytes.fromhex("fa31c08ed8be207cbaf803fcac84c07403eeebf8f4ebfd").ljust(0x20, b"\x90")
    return (code + words.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"


async def memory_mib(console: Console) -> int:
    """All the memory that the guest sees."""
    return int(await answer(console, "awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo"))


async def memory_becomes(console: Console, wanted: Callable[[int], bool]) -> None:
    """Return once the guest sees so much memory."""
    seen: list[int] = []

    async def look() -> bool:
        seen.append(await memory_mib(console))
        return wanted(seen[-1])

    try:
        await until(look, what="the guest's memory changes")
    except AssertionError as exc:
        raise AssertionError(f"{exc}; it saw {seen} MiB") from None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dumped(bench: VmBench, instance_id: str) -> ElementTree.Element:
    return ElementTree.fromstring(bench.libvirtd.virsh("dumpxml", instance_id).stdout)


class TestSizes:
    async def test_a_running_guest_gets_memory_and_processors_up_to_its_maxima(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        options = VmOptions(max_cpus=2, max_memory_mb=MEMORY_MB + 128)
        made, console = await ready(driver, bench.spec(vm=options))
        # Its balloon takes from it what it has not yet.
        await memory_becomes(console, lambda mib: mib <= MEMORY_MB)

        seen = await driver.update(made.instance_id, Sizes(cpu_millis=1500, memory_mb=MEMORY_MB + 128))

        assert seen.status is InstanceStatus.RUNNING
        await answer(console, "until [ -e /sys/devices/system/cpu/cpu1 ]; do sleep 0.1; done")
        await memory_becomes(console, lambda mib: mib > MEMORY_MB + 64)
        tuning = dumped(bench, made.instance_id).find("cputune/global_quota")
        assert tuning is not None
        assert tuning.text == "150000"

    async def test_more_than_the_maxima_is_refused_while_it_runs_and_had_after_a_stop(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        before = await memory_mib(console)
        for sizes, told in (
            (Sizes(cpu_millis=2000, memory_mb=MEMORY_MB), "max_cpus"),
            (Sizes(cpu_millis=1000, memory_mb=MEMORY_MB + 64), "max_memory_mb"),
        ):
            with pytest.raises(FailedPrecondition, match=told) as refused:
                await driver.update(made.instance_id, sizes)
            assert refused.value.reason == "UPDATE_REFUSED"
        await driver.stop(made.instance_id, grace_s=0.0)

        await driver.update(made.instance_id, Sizes(cpu_millis=2000, memory_mb=MEMORY_MB + 64))
        await console.close()
        await driver.start(made.instance_id)

        console = await driver.attach(made.instance_id)
        await read_until(console, b"READY")
        assert await answer(console, "nproc") == "2"
        assert await memory_mib(console) > before + 40

    async def test_what_holds_its_old_sizes_is_in_the_way(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, _ = await ready(driver, bench.shell())
        wanted = Sizes(cpu_millis=1000, memory_mb=MEMORY_MB + 64)
        await driver.suspend(made.instance_id)
        with pytest.raises(FailedPrecondition, match="on disk"):
            await driver.update(made.instance_id, wanted)
        await driver.start(made.instance_id)
        await driver.create_snapshot(made.instance_id, "kept", kind=SnapshotKind.FULL)
        await driver.stop(made.instance_id, grace_s=0.0)
        with pytest.raises(FailedPrecondition, match="snapshots"):
            await driver.update(made.instance_id, wanted)


class TestStop:
    async def test_the_power_button_ends_a_guest_that_listens(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        await answer(console, "true")

        seen = await driver.stop(made.instance_id, grace_s=60.0)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)

    async def test_a_guest_that_does_not_listen_is_ended_by_force(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        await answer(console, "kill $(cat /run/acpid.pid)")

        seen = await driver.stop(made.instance_id, grace_s=0.5)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "KILLED", 137)

    async def test_restart_drops_the_memory_of_a_suspended_guest(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        await answer(console, "echo here > /note")
        await driver.suspend(made.instance_id)
        await console.close()

        seen = await driver.restart(made.instance_id, grace_s=0.0)

        assert seen.status is InstanceStatus.RUNNING
        console = await driver.attach(made.instance_id)
        await read_until(console, b"READY")
        assert "No such file" in await answer(console, "cat /note")

    async def test_a_guest_that_restarts_itself_is_the_same_run(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        before = await driver.get(made.instance_id)

        await console.write(b"reboot -f\n")
        await read_until(console, b"READY")

        after = await driver.get(made.instance_id)
        assert (after.status, after.started_at) == (InstanceStatus.RUNNING, before.started_at)


class TestDisks:
    async def test_what_a_guest_writes_outlives_it_and_never_reaches_the_image(
        self, bench: VmBench, driver: LibvirtDriver, base: Path
    ) -> None:
        before = digest(base)
        made, console = await ready(driver, bench.spec(image=str(base), disk_gb=1))
        assert await answer(console, "head -c 14 /dev/vda") == "from the image"
        assert await answer(console, "cat /sys/block/vda/size") == str((1 << 30) // 512)

        await answer(console, "printf 'by the guest..' | dd of=/dev/vda conv=notrunc 2>/dev/null; sync")
        await console.close()
        await driver.restart(made.instance_id, grace_s=0.0)
        console = await driver.attach(made.instance_id)
        await read_until(console, b"READY")

        assert await answer(console, "head -c 14 /dev/vda") == "by the guest.."
        assert digest(base) == before
        assert {digest(path) for path in (bench.data / "bases").glob("*.raw")} == {before}

    async def test_an_image_that_is_replaced_afterwards_does_not_reach_the_guest(
        self, bench: VmBench, driver: LibvirtDriver, base: Path
    ) -> None:
        made = vm_assignment(bench.spec(image=str(base)))
        await driver.create(made)
        await asyncio.to_thread(base.write_bytes, b"something else".ljust(4 * MIB, b"\0"))

        await driver.start(made.instance_id)

        console = await driver.attach(made.instance_id)
        await read_until(console, b"READY")
        assert await answer(console, "head -c 14 /dev/vda") == "from the image"

    async def test_a_qcow2_image_is_a_base_too_and_the_disk_has_its_size(
        self, bench: VmBench, driver: LibvirtDriver, base: Path
    ) -> None:
        image = bench.images / "base.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", base, image)
        _, console = await ready(driver, bench.spec(image=str(image)))

        assert await answer(console, "head -c 14 /dev/vda; cat /sys/block/vda/size") == "from the image8192"

    async def test_a_machine_boots_from_its_disk(self, bench: VmBench, driver: LibvirtDriver) -> None:
        image = bench.images / "boots.raw"
        image.write_bytes(boot_sector("booted from the disk").ljust(MIB, b"\0"))
        made = await started(driver, InstanceSpec(image=str(image), memory_mb=64))
        console = await driver.attach(made.instance_id)

        await read_until(console, b"booted from the disk")

    async def test_another_image_for_the_same_instance_is_refused(
        self, bench: VmBench, driver: LibvirtDriver, base: Path
    ) -> None:
        made = vm_assignment(bench.spec(image=str(base)))
        await driver.create(made)
        other = bench.images / "other.raw"
        other.write_bytes(b"x" * MIB)

        with pytest.raises(AlreadyExists):
            await driver.create(vm_assignment(bench.spec(image=str(other)), instance_id=made.instance_id))

    async def test_images_are_taken_over_once_for_all_that_use_them(
        self, bench: VmBench, driver: LibvirtDriver, base: Path
    ) -> None:
        for _ in range(3):
            await driver.create(vm_assignment(bench.spec(image=str(base))))

        listed = bench.libvirtd.virsh("list", "--all", "--name").stdout.split()
        sources = {
            source.get("file")
            for name in listed
            for source in dumped(bench, name).findall("devices/disk/backingStore/source")
        }
        assert len(listed) == 3
        assert len(sources) == 1


class TestMachine:
    async def test_cloud_init_finds_its_seed(self, bench: VmBench, driver: LibvirtDriver) -> None:
        cloud_init = CloudInit(hostname="web-1", user_data="#!/bin/sh\necho 'hello & <good> \"day\"'\n")
        _, console = await ready(driver, bench.spec(cloud_init=cloud_init))

        await answer(
            console,
            "mkdir /seed; mount -t iso9660 -o ro /dev/vdb /seed || mount -t iso9660 -o ro /dev/vda /seed",
        )

        assert await answer(console, "sh /seed/user-data") == 'hello & <good> "day"'
        assert "web-1" in await answer(console, "cat /seed/meta-data")

    async def test_it_can_grow_later(self, bench: VmBench, driver: LibvirtDriver) -> None:
        spec = bench.spec(cpu_millis=1000, vm=VmOptions(max_cpus=2, max_memory_mb=2 * MEMORY_MB))
        made, console = await ready(driver, spec)

        domain = dumped(bench, made.instance_id)

        vcpu = domain.find("vcpu")
        assert vcpu is not None
        assert (vcpu.text, vcpu.get("current")) == ("2", "1")
        assert domain.findtext("memory") == str(2 * MEMORY_MB * 1024)
        assert await answer(console, "nproc") == "1"
        bench.libvirtd.virsh("setvcpus", made.instance_id, "2", "--live")
        assert await answer(console, "sleep 1; echo 1 > /sys/devices/system/cpu/cpu1/online; nproc") == "2"

    async def test_a_fraction_of_a_core_is_a_quota(self, bench: VmBench, driver: LibvirtDriver) -> None:
        made = await started(driver, bench.spec(cpu_millis=1500))

        quota = bench.libvirtd.virsh("schedinfo", made.instance_id).stdout

        assert ["global_quota", ":", "150000"] in [line.split() for line in quota.splitlines()]

    async def test_uefi_begins_and_its_variables_go_with_it(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = vm_assignment(bench.spec(disk_gb=1, vm=VmOptions(firmware=Firmware.UEFI), memory_mb=192))
        await driver.create(made)
        await driver.start(made.instance_id)
        assert list((bench.libvirtd.directory / "lib" / "qemu" / "nvram").iterdir())
        with pytest.raises(FailedPrecondition) as caught:
            await driver.create_snapshot(made.instance_id, "first", kind=SnapshotKind.FULL)
        assert caught.value.reason == "SNAPSHOT_UNSUPPORTED"
        console = await driver.attach(made.instance_id)
        await read_until(console, b"READY")
        assert await answer(console, "ls -d /sys/firmware/efi") == "/sys/firmware/efi"

        assert await driver.delete(made.instance_id)

        assert bench.leftovers() == {}

    async def test_without_a_disk_there_is_nowhere_to_keep_a_snapshot(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made = await started(driver, bench.spec())

        with pytest.raises(FailedPrecondition, match=r"disk_gb") as caught:
            await driver.create_snapshot(made.instance_id, "first", kind=SnapshotKind.FULL)

        assert caught.value.reason == "NO_DISK"

    async def test_memory_and_disk_are_both_as_they_were_after_going_back(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec(disk_gb=1))
        await answer(console, "echo before > /note; printf before > /dev/vda; sync")
        kept = await driver.create_snapshot(made.instance_id, "first", kind=SnapshotKind.FULL)
        await answer(console, "echo after > /note; printf after. > /dev/vda; sync")
        await console.close()

        seen = await driver.restore_snapshot(made.instance_id, "first")

        assert kept.memory
        assert seen.status is InstanceStatus.RUNNING
        console = await driver.attach(made.instance_id)
        await console.write(b"\n")
        assert await answer(console, "cat /note") == "before"
        assert await answer(console, "head -c 6 /dev/vda") == "before"
        assert (await driver.get(made.instance_id)).generation == made.generation

    async def test_the_guests_own_memory_is_told(self, bench: VmBench, driver: LibvirtDriver) -> None:
        made, console = await ready(driver, bench.spec(disk_gb=1))
        await answer(console, "dd if=/dev/zero of=/dev/vda bs=1M count=4; sync; sleep 3")

        stats = await sampled(driver, made.instance_id)

        assert stats.memory_limit_bytes == MEMORY_MB << 20
        assert stats.memory_used_bytes is not None
        assert stats.memory_used_bytes < MEMORY_MB << 20
        assert stats.memory_working_set_bytes is not None
        assert stats.block_write_bytes is not None
        assert stats.block_write_bytes >= 4 * MIB
        assert stats.cpu_usage_ns is not None
        assert stats.cpu_usage_ns > 0


class TestOthers:
    async def test_somebody_elses_machine_is_neither_listed_nor_deleted(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        path = bench.libvirtd.directory / "foreign.xml"
        path.write_text(
            "<domain type='qemu'><name>foreign</name><memory unit='MiB'>32</memory>"
            "<os><type arch='x86_64'>hvm</type></os></domain>",
            encoding="utf-8",
        )
        bench.libvirtd.virsh("define", str(path))
        try:
            assert await driver.list() == ()
            assert await driver.recover("foreign", {}) is None
            assert await driver.delete("foreign") is False
            assert "foreign" in bench.libvirtd.virsh("list", "--all", "--name").stdout
        finally:
            bench.libvirtd.virsh("undefine", "foreign")

    async def test_what_is_printed_while_no_agent_runs_is_there_afterwards(
        self, bench: VmBench, driver: LibvirtDriver
    ) -> None:
        made, console = await ready(driver, bench.spec())
        await console.write(b"sleep 1; seq 20000; echo last''word\n")
        await read_until(console, b"sleep 1")
        await driver.aclose()

        second = await bench.open()
        try:
            await second.recover(made.instance_id, {})
            console = await second.attach(made.instance_id)
            output = await read_until(console, b"lastword")
            numbers = [int(word) for word in output.split() if word.isdigit()]
            assert numbers[-20000:] == list(range(1, 20001))
            assert await answer(console, "echo $((6*7))") == "42"
        finally:
            await second.aclose()
