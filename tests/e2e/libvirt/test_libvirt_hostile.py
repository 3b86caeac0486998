"""Specifications that try to reach what is not theirs: refused with the field named, and nothing is left of them.

What of the strings is decided without libvirt is in tests/unit/agent/libvirt; here they meet the real one.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from hvtest_disk_images import qcow2_header, qemu_img
from hvtest_driver_watching import read_until
from hvtest_guests import linux_guest
from hvtest_vms import VmBench, answer, ready, vm_assignment
from hypervisor.agent.drivers.libvirt import LibvirtDriver
from hypervisor.core.errors import HypervisorError, InvalidArgument
from hypervisor.core.machines import CloudInit, NetworkInterface, SnapshotKind, VmOptions
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
HOSTILE = '</name><x a="\'"/>&amp;<![CDATA[ ]]> --> %s {} $(id) `id` ../../etc; \\ ü 🦊'


def _link(bench: VmBench) -> str:
    path = bench.images / "link.img"
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/shadow")
    return str(path)


def _link_of_a_directory(bench: VmBench) -> str:
    path = bench.images / "directory"
    path.unlink(missing_ok=True)
    path.symlink_to("/etc")
    return str(path / "shadow")


def _backing(bench: VmBench) -> str:
    path = bench.images / "backing.qcow2"
    path.write_bytes(qcow2_header(backing="/etc/shadow"))
    return str(path)


def _real_backing(bench: VmBench) -> str:
    base, path = bench.images / "real.raw", bench.images / "over.qcow2"
    base.write_bytes(b"x" * MIB)
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", base, path)
    return str(path)


def _data_file(bench: VmBench) -> str:
    path = bench.images / "data-file.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={bench.images}/data.raw,data_file_raw=on", path, "1M")
    return str(path)


def _fifo(bench: VmBench) -> str:
    path = bench.images / "fifo"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return str(path)


IMAGES: dict[str, Callable[[VmBench], str]] = {
    "outside": lambda _: "/etc/shadow",
    "climbing": lambda bench: f"{bench.images}/../../../etc/shadow",
    "a link": _link,
    "through a link": _link_of_a_directory,
    "a backing file": _backing,
    "a real backing file": _real_backing,
    "a data file": _data_file,
    "a FIFO": _fifo,
    "a directory": lambda bench: str(bench.images),
    "a device": lambda _: "/dev/kvm",
    "a zero": lambda bench: f"{bench.images}/a\0b",
    "a protocol": lambda _: "nbd:localhost:10809",
    "json": lambda _: 'json:{"driver":"file","filename":"/etc/shadow"}',
}


@pytest.mark.parametrize("name", sorted(IMAGES))
async def test_an_image_that_leads_elsewhere_is_refused(
    bench: VmBench, driver: LibvirtDriver, name: str
) -> None:
    path = await asyncio.to_thread(IMAGES[name], bench)

    with pytest.raises(InvalidArgument) as caught:
        await driver.create(vm_assignment(bench.spec(image=path)))

    assert caught.value.metadata["field"] == "spec.image"
    assert bench.leftovers() == {}


@pytest.mark.parametrize("field", ["kernel_path", "initrd_path"])
@pytest.mark.parametrize(
    "name", ["outside", "climbing", "a link", "through a link", "a FIFO", "a directory", "a zero"]
)
async def test_a_kernel_or_ram_disk_outside_the_roots_is_refused(
    bench: VmBench, driver: LibvirtDriver, field: str, name: str
) -> None:
    path = await asyncio.to_thread(IMAGES[name], bench)

    with pytest.raises(InvalidArgument) as caught:
        await driver.create(vm_assignment(replace(bench.spec(), **{field: path})))

    assert caught.value.metadata["field"] == f"spec.{field}"
    assert bench.leftovers() == {}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"networks": (NetworkInterface(bridge="virbr0' onerror='x"),)}, "spec.networks[0].bridge"),
        ({"vm": VmOptions(host_devices=("0000:00:1f.2",))}, "spec.vm.host_devices[0]"),
        ({"kernel_args": "quiet\0init=/bin/sh"}, "spec.kernel_args"),
        ({"disk_gb": 1, "command": ("sh", "-c", HOSTILE)}, "spec.command"),
    ],
)
async def test_what_is_not_the_nodes_to_give_is_refused(
    bench: VmBench, driver: LibvirtDriver, more: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await driver.create(vm_assignment(bench.spec(**more)))

    assert caught.value.metadata["field"] == field
    assert bench.leftovers() == {}


async def test_an_image_larger_than_the_disk_is_refused(bench: VmBench, driver: LibvirtDriver) -> None:
    path = bench.images / "large.qcow2"
    await asyncio.to_thread(qemu_img, "create", "-f", "qcow2", path, "3G")

    with pytest.raises(InvalidArgument) as caught:
        await driver.create(vm_assignment(InstanceSpec(image=str(path), disk_gb=1)))

    assert caught.value.metadata["field"] == "spec.disk_gb"
    assert bench.leftovers() == {}


async def test_names_and_arguments_full_of_markup_reach_the_guest_as_they_are(
    bench: VmBench, driver: LibvirtDriver
) -> None:
    words = "</cmdline><x>&amp;'\"` ,file=/etc/shadow"
    cloud_init = CloudInit(hostname=HOSTILE, user_data=HOSTILE, network_config=HOSTILE)
    spec = bench.spec(words, cloud_init=cloud_init, disk_gb=1)
    made = vm_assignment(spec, name=HOSTILE, project=HOSTILE)
    await driver.create(made)
    await driver.start(made.instance_id)
    console = await driver.attach(made.instance_id)
    await read_until(console, b"READY")

    assert (await answer(console, "cat /proc/cmdline")).endswith(words)
    await console.close()
    await driver.create_snapshot(made.instance_id, "first", kind=SnapshotKind.FULL)
    other = await bench.open()
    adopted = await other.recover(made.instance_id, {})
    await other.aclose()
    assert adopted is not None
    assert adopted.status is InstanceStatus.RUNNING


async def test_an_image_whose_name_is_full_of_markup_is_used_and_does_no_harm(
    bench: VmBench, driver: LibvirtDriver
) -> None:
    path = bench.images / "a'b\"c,file=x<&>;$(id) ü.raw"
    await asyncio.to_thread(path.write_bytes, b"from the image".ljust(MIB, b"\0"))

    _, console = await ready(driver, bench.spec(image=str(path)))

    assert await answer(console, "head -c 14 /dev/vda") == "from the image"


async def test_a_raw_image_in_which_a_qcow2_was_written_stays_raw(
    bench: VmBench, driver: LibvirtDriver
) -> None:
    """What the guest writes into its disk is never read as the format of anything."""
    path = bench.images / "plain.raw"
    await asyncio.to_thread(path.write_bytes, b"x" * MIB)
    made, console = await ready(driver, bench.spec(image=str(path)))
    header = "".join(f"\\x{byte:02x}" for byte in qcow2_header(backing="/etc/shadow", pad_to=120))
    await answer(console, f"printf '{header}' | dd of=/dev/vda conv=notrunc; sync")
    await console.close()

    seen = await driver.restart(made.instance_id, grace_s=0.0)

    assert seen.status is InstanceStatus.RUNNING
    console = await driver.attach(made.instance_id)
    await read_until(console, b"READY")
    assert await answer(console, "cat /sys/block/vda/size; head -c 3 /dev/vda") == f"{MIB // 512}\nQFI"


async def test_a_kernel_that_is_none_fails_to_boot_and_is_deleted_like_any_other(
    bench: VmBench, driver: LibvirtDriver
) -> None:
    path = bench.images / "kernel"
    await asyncio.to_thread(path.write_bytes, os.urandom(4 * MIB))
    made = vm_assignment(replace(bench.spec(), kernel_path=str(path), initrd_path=str(linux_guest().initrd)))
    await driver.create(made)

    # Whether QEMU takes it is QEMU's affair; what it may not do is leave something behind, or fail in another way.
    with contextlib.suppress(HypervisorError):
        await driver.start(made.instance_id)
    assert await driver.delete(made.instance_id)

    assert bench.leftovers() == {}


def test_the_directory_of_the_driver_can_be_gone_through_but_not_looked_into(bench: VmBench) -> None:
    others = {
        str(path.relative_to(bench.data)): oct(path.stat().st_mode & 0o007)
        for path in (bench.data, *bench.data.iterdir())
        if path.is_dir() and path != Path(bench.data)
    }

    assert set(others.values()) <= {"0o1"}
