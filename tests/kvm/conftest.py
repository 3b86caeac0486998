"""One node's directories for each test, where a Linux guest boots under Firecracker; else the skip says why not."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest

from hvtest_linux_microvms import LinuxFirecrackerBench, no_linux_guest
from hypervisor.agent.drivers.microvm import MicrovmDriver


@pytest.fixture(scope="session", autouse=True)
def kvm_is_real() -> None:
    """Boots one guest to see."""
    if why := no_linux_guest():
        pytest.skip(why)


@pytest.fixture
def bridge() -> Iterator[str]:
    """A bridge of the node with the address 10.199.78.1/24."""
    name = f"hvk{os.getpid() % 100_000}"
    for words in (
        f"link add {name} type bridge",
        f"addr add 10.199.78.1/24 dev {name}",
        f"link set {name} up",
    ):
        subprocess.run(["ip", *words.split()], check=True, timeout=30)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True, timeout=30)


@pytest.fixture
def node(bridge: str) -> Iterator[LinuxFirecrackerBench]:
    """Fails when anything is left at the end."""
    with LinuxFirecrackerBench(bridges=(bridge,)) as node:
        yield node
        assert node.leftovers() == {}


@pytest.fixture
async def micro(node: LinuxFirecrackerBench) -> AsyncIterator[MicrovmDriver]:
    """A driver; its instances are deleted at the end."""
    driver = node.driver()
    yield driver
    for seen in await driver.list():
        await driver.delete(seen.instance_id)
    await driver.aclose()
