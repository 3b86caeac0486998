"""Saved memory of a QEMU microVM survives an agent that dies while loading it; see test_microvm_resumed_once."""

import asyncio
from collections.abc import Iterator

import pytest

from hvtest_microvm_deaths import die_while
from hvtest_microvms import assignment
from hvtest_qemu_microvms import QemuBench, lacking, start_ready
from hvtest_vms import answer
from hypervisor.core.states import InstanceStatus

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def bench() -> Iterator[QemuBench]:
    if why := lacking():
        pytest.skip(why)
    with QemuBench() as bench:
        yield bench


async def test_it_stays_suspended_until_its_guest_runs_and_then_goes_on(bench: QemuBench) -> None:
    made = assignment(bench.spec(disk_gb=1))
    instance_id = made.instance_id
    driver = bench.driver()
    await driver.create(made)
    await start_ready(driver, instance_id)
    console = await driver.attach(instance_id)
    await answer(console, "word=kept")
    await console.close()
    await driver.suspend(instance_id)
    await driver.aclose()
    memory = bench.config.data_dir / "instances" / instance_id / "suspended"

    for step in ("loading", "loaded", "going on"):
        await asyncio.to_thread(die_while, "start", step, instance_id, config=bench.config, vmm=bench.vmm())
        driver = bench.driver()
        seen = await driver.recover(instance_id, {})
        assert seen is not None
        assert (step, seen.status, seen.reason) == (step, InstanceStatus.STOPPED, "SUSPENDED")
        await driver.aclose()
        assert memory.exists()

    await asyncio.to_thread(die_while, "start", "running", instance_id, config=bench.config, vmm=bench.vmm())
    driver = bench.driver()
    seen = await driver.recover(instance_id, {})
    assert seen is not None
    assert seen.status is InstanceStatus.RUNNING
    console = await driver.attach(instance_id)
    assert await answer(console, "echo $word") == "kept"
    await console.close()
    assert not memory.exists()
    await driver.delete(instance_id)
    await driver.aclose()
    assert bench.leftovers() == {}
