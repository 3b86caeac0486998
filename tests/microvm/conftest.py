"""One node's directories for each test, and a driver over them that has jails."""

from collections.abc import AsyncIterator, Iterator

import pytest

from hvtest_microvms import FirecrackerBench, missing
from hypervisor.agent.drivers.microvm import MicrovmDriver


@pytest.fixture
def node() -> Iterator[FirecrackerBench]:
    """Skips, with the reason, where Firecracker cannot run. Fails when anything is left at the end."""
    if why := missing():
        pytest.skip(why)
    with FirecrackerBench() as node:
        yield node
        assert node.leftovers() == {}


@pytest.fixture
async def micro(node: FirecrackerBench) -> AsyncIterator[MicrovmDriver]:
    """A driver; its instances are deleted at the end."""
    driver = node.driver()
    yield driver
    for seen in await driver.list():
        await driver.delete(seen.instance_id)
    await driver.aclose()
