"""Virtual machines from images of the cluster, over a real libvirtd: what the cache hands over is what boots."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_driver_watching import read_until
from hvtest_guests import KERNEL_ARGS, linux_guest
from hvtest_image_server import ContentServer, running_cache
from hvtest_images import sha256_of
from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_vms import MEMORY_MB, VmBench, vm_assignment
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.core.errors import NotFound
from hypervisor.core.images import ImageKind, ImageSource
from hypervisor.core.model import InstanceSpec

pytestmark = [
    pytest.mark.skipif(
        bool(missing_for_libvirt()),
        reason=f"needs {', '.join(missing_for_libvirt())}: tools/setup installs it",
    ),
    pytest.mark.timeout(180),
]

SPEC = InstanceSpec(
    kernel_path="image:linux",
    initrd_path="image:ramdisk",
    kernel_args=f'{KERNEL_ARGS} GUEST_RUN="echo booted from images"',
    memory_mb=MEMORY_MB,
)


@pytest.fixture
def bench() -> Iterator[VmBench]:
    with PrivateLibvirtd(Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))) as private:
        yield VmBench(private)


def source(name: str, kind: ImageKind, data: bytes, server: str) -> ImageSource:
    return ImageSource(
        name=name, kind=kind, format="x", size_bytes=len(data), sha256=sha256_of(data), servers=(server,)
    )


async def test_machines_boot_from_images_and_share_them(bench: VmBench, tmp_path: Path) -> None:
    guest = linux_guest()
    kernel, initrd = guest.kernel.read_bytes(), guest.initrd.read_bytes()
    driver = await bench.open()
    made: list[Assignment] = []
    try:
        async with ContentServer(kernel, initrd) as server, running_cache(tmp_path) as cache:
            sources = [
                source("linux", ImageKind.KERNEL, kernel, server.url),
                source("ramdisk", ImageKind.INITRD, initrd, server.url),
            ]
            for _ in range(2):
                wanted = vm_assignment(SPEC)
                images = await cache.obtain(wanted.instance_id, sources)
                made.append(vm_assignment(SPEC, instance_id=wanted.instance_id, images=images))
                await driver.create(made[-1])
            # What libvirt's QEMU reads is its own, so the node's cache may even be gone.
            shutil.rmtree(tmp_path)

        await driver.start(made[0].instance_id)
        console = await driver.attach(made[0].instance_id)
        await read_until(console, b"booted from images")
        await console.close()
        assert len(list(bench.config().bases.iterdir())) == 2
    finally:
        for one in made:
            await driver.delete(one.instance_id)
        await driver.aclose()
    assert bench.leftovers() == {}


async def test_an_image_that_was_not_handed_over_is_refused(bench: VmBench) -> None:
    driver = await bench.open()
    try:
        with pytest.raises(NotFound, match=r"spec\.kernel_path: image linux"):
            await driver.create(vm_assignment(SPEC))
    finally:
        await driver.aclose()
    assert bench.leftovers() == {}
