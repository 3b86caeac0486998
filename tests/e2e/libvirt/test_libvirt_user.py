"""QEMU as a user of its own, as distributions have it: it is given what it needs, and the driver gets it all back."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_driver_watching import read_until
from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_vms import VmBench, answer, ready
from hypervisor.agent.drivers.libvirt import LibvirtDriver
from hypervisor.core.machines import CloudInit, SnapshotKind
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[PrivateLibvirtd]:
    missing = missing_for_libvirt()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: tools/setup installs what is missing, as root")
    with PrivateLibvirtd(Path(tempfile.mkdtemp(prefix="hv", dir="/tmp")), own_user=True) as private:
        yield private


async def test_a_whole_life(bench: VmBench, driver: LibvirtDriver) -> None:
    base = bench.images / "base.raw"
    await asyncio.to_thread(base.write_bytes, b"from the image".ljust(1 << 20, b"\0"))
    made, console = await ready(driver, bench.spec(image=str(base), disk_gb=1, cloud_init=CloudInit()))
    status = Path(f"/proc/{bench.libvirtd.qemu(made.instance_id)}/status")
    assert "\nUid:\t0\t" not in await asyncio.to_thread(status.read_text)

    assert await answer(console, "head -c 14 /dev/vda") == "from the image"
    await driver.create_snapshot(made.instance_id, "first", kind=SnapshotKind.FULL)
    await answer(console, "printf 'by the guest..' > /dev/vda; sync")
    await console.close()
    await driver.restore_snapshot(made.instance_id, "first")
    assert (await driver.suspend(made.instance_id)).reason == "SUSPENDED"
    assert (await driver.start(made.instance_id)).status is InstanceStatus.RUNNING
    console = await driver.attach(made.instance_id)
    await console.write(b"\n")
    assert await answer(console, "head -c 14 /dev/vda") == "from the image"
    await console.close()
    await driver.restart(made.instance_id, grace_s=0.0)
    console = await driver.attach(made.instance_id)
    await read_until(console, b"READY")
    assert (await driver.stop(made.instance_id, grace_s=60.0)).reason == "EXITED"
    assert await driver.delete(made.instance_id)

    assert bench.leftovers() == {}
