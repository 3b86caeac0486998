"""MicroVMs from images of the cluster: kernel, initial RAM disk and disk come from the node's cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_driver_watching import read_until
from hvtest_guests import KERNEL_ARGS
from hvtest_image_server import ContentServer, running_cache
from hvtest_images import raw_disk, sha256_of
from hvtest_qemu_microvms import QemuBench, lacking
from hypervisor.agent.drivers.driver import Assignment, LocalImage
from hypervisor.core.ids import new_id
from hypervisor.core.images import ImageKind, ImageSource
from hypervisor.core.model import InstanceSpec
from hypervisor.core.states import InstanceType

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

DISK = raw_disk(sectors=2048, fill=b"D")


def read(image: LocalImage) -> bytes:
    return Path(image.path).read_bytes()


@pytest.fixture
def bench() -> Iterator[QemuBench]:
    with QemuBench() as bench:
        yield bench


async def test_a_microvm_boots_from_images_and_never_writes_to_them(bench: QemuBench, tmp_path: Path) -> None:
    contents = {
        "linux": (ImageKind.KERNEL, bench.kernel.read_bytes()),
        "ramdisk": (ImageKind.INITRD, bench.initrd.read_bytes()),
        "data": (ImageKind.DISK, DISK),
    }
    instance_id = new_id("i")
    driver = bench.driver()
    async with (
        ContentServer(*(data for _, data in contents.values())) as server,
        running_cache(tmp_path) as cache,
    ):
        images = await cache.obtain(
            instance_id,
            [
                ImageSource(
                    name=name,
                    kind=kind,
                    format="raw",
                    size_bytes=len(data),
                    sha256=sha256_of(data),
                    servers=(server.url,),
                )
                for name, (kind, data) in contents.items()
            ],
        )
        script = "head -c 4 /dev/vda; echo; dd if=/dev/zero of=/dev/vda bs=512 count=8; sync; echo written"
        try:
            await driver.create(
                Assignment(
                    instance_id=instance_id,
                    name="micro",
                    project="default",
                    type=InstanceType.MICROVM,
                    spec=InstanceSpec(
                        image="data",
                        kernel_path="image:linux",
                        initrd_path="image:ramdisk",
                        kernel_args=f'{KERNEL_ARGS} GUEST_RUN="{script}"',
                        memory_mb=128,
                    ),
                    images=images,
                )
            )
            await driver.start(instance_id)
            console = await driver.attach(instance_id)
            seen = await read_until(console, b"written")
            await console.close()
        finally:
            await driver.delete(instance_id)
            await driver.aclose()

        assert b"DDDD" in seen
        for name, (_, data) in contents.items():
            assert read(images[name]) == data
    assert bench.leftovers() == {}
