"""Many starts at once of the real Firecracker: how many are under way at the same time, and that none is lost."""

import asyncio
from dataclasses import replace

import pytest

from hvtest_microvms import FIRECRACKER, JAILER, FirecrackerBench, answer, assignment
from hypervisor.agent.drivers.microvm import FirecrackerVmm, MicrovmDriver
from hypervisor.agent.drivers.microvm.vmm import Launch, Machine, Run, SavedState
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.ids import new_id
from hypervisor.core.states import InstanceStatus

AT_ONCE = 2


class Counting(FirecrackerVmm):
    """Counts the starts that are under way."""

    now = most = 0
    refuse = ""
    """Instance that does not boot."""

    async def launch(self, machine: Machine) -> Launch:
        self.now += 1
        self.most = max(self.most, self.now)
        return await super().launch(machine)

    async def boot(self, machine: Machine, run: Run, state: SavedState | None = None) -> None:
        try:
            if machine.instance_id == self.refuse:
                raise FailedPrecondition("refused", reason="VMM_REFUSED")
            await super().boot(machine, run, state)
        finally:
            self.now -= 1


def driver_of(node: FirecrackerBench) -> tuple[MicrovmDriver, Counting]:
    node.config = replace(node.config, starts_at_once=AT_ONCE)
    vmm = Counting(FIRECRACKER, jailer=JAILER, clock=SystemClock())
    return MicrovmDriver(node.config, (vmm,), clock=SystemClock(), new_id=new_id), vmm


async def test_starts_wait_for_each_other_and_none_is_lost(node: FirecrackerBench) -> None:
    driver, vmm = driver_of(node)
    made = [assignment(node.spec(memory_mb=32)) for _ in range(4 * AT_ONCE)]
    for each in made:
        await driver.create(each)

    started = await asyncio.gather(*(driver.start(each.instance_id) for each in made))

    assert vmm.most == AT_ONCE
    assert {seen.status for seen in started} == {InstanceStatus.RUNNING}
    for each in made:
        assert "x" in await answer(driver, each.instance_id, "echo x", "\r\nx\r\n")
        await driver.delete(each.instance_id)
    await driver.aclose()


async def test_a_start_that_fails_lets_the_next_one_begin(node: FirecrackerBench) -> None:
    driver, vmm = driver_of(node)
    made = [assignment(node.spec(memory_mb=32)) for _ in range(AT_ONCE + 1)]
    for each in made:
        await driver.create(each)
    for _ in range(AT_ONCE):
        vmm.refuse = made[0].instance_id
        with pytest.raises(FailedPrecondition, match="refused"):
            await driver.start(made[0].instance_id)

    seen = [await driver.start(each.instance_id) for each in made[1:]]

    assert {one.status for one in seen} == {InstanceStatus.RUNNING}
    for each in made:
        await driver.delete(each.instance_id)
    await driver.aclose()
