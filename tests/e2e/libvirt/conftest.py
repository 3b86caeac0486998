"""A private libvirtd for the tests of a module, and drivers over it that leave nothing behind."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_vms import VmBench
from hypervisor.agent.drivers.libvirt import LibvirtDriver


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[PrivateLibvirtd]:
    missing = missing_for_libvirt()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: tools/setup installs what is missing, as root")
    # Short: sockets are below it, whose paths have at most 107 bytes.
    with PrivateLibvirtd(Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))) as private:
        yield private


@pytest.fixture(scope="module")
def bench(libvirtd: PrivateLibvirtd) -> VmBench:
    return VmBench(libvirtd)


@pytest.fixture
async def driver(bench: VmBench) -> AsyncIterator[LibvirtDriver]:
    driver = await bench.open()
    yield driver
    await driver.aclose()
    cleaner = await bench.open()
    for observation in await cleaner.list():
        await cleaner.delete(observation.instance_id)
    await cleaner.aclose()
    assert bench.leftovers() == {}
