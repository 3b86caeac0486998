"""`microvm.vmm: auto` on a node whose KVM takes a Linux kernel and hangs it: the real kernel, under the real VMMs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hvtest_agent_waiting import PATIENCE
from hvtest_linux_microvms import LinuxFirecrackerBench
from hvtest_microvms import assignment, missing
from hvtest_qemu_microvms import lacking
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.agent.drivers.microvm.qemu import QemuVmm
from hypervisor.agent.drivers.microvm.qemu_command import Accelerator
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.machines import VmmChoice
from hypervisor.core.states import InstanceStatus

pytestmark = [
    pytest.mark.skipif(bool(missing() or lacking()), reason=missing() or lacking()),
    pytest.mark.timeout(180),
]

PROBE_S = 10.0
_QEMU = Path("qemu-system-x86_64")


@asynccontextmanager
async def choosing(node: LinuxFirecrackerBench, *, timeout_s: float) -> AsyncIterator[MicrovmDriver]:
    """The VMMs of a node as the agent has them, but for QEMU by KVM, which is another matter."""
    config = replace(node.config, kernel=node.kernel, vmm=VmmChoice.AUTO, probe_timeout_s=timeout_s)
    clock = SystemClock()
    driver = MicrovmDriver(
        config, (node.vmm(), QemuVmm(_QEMU, Accelerator.TCG, clock=clock)), clock=clock, new_id=new_id
    )
    try:
        yield driver
        for seen in await driver.list():
            await driver.delete(seen.instance_id)
    finally:
        await driver.aclose()


async def run(driver: MicrovmDriver, node: LinuxFirecrackerBench) -> tuple[str, str]:
    """What an instance that asks for nothing runs in, and why; its guest has come up."""
    made = assignment(node.spec(arguments="panic=-1 console=ttyS0"))
    await driver.create(made)
    started = await driver.start(made.instance_id)
    assert started.status is InstanceStatus.RUNNING
    console = await driver.attach(made.instance_id)
    seen = b""
    async with asyncio.timeout(90.0 * PATIENCE):
        while b"READY" not in seen:
            data = await console.read()
            assert data, f"the guest ended before it was up: {seen!r}"
            seen += data
    await console.close()
    status = await driver.get(made.instance_id)
    return status.runtime, status.runtime_reason


async def test_auto_takes_qemu_with_the_reason_and_keeps_the_answer() -> None:
    with LinuxFirecrackerBench() as node:
        async with choosing(node, timeout_s=PROBE_S) as driver:
            made = assignment(node.shell())
            # Waits for the probe, which would go on for ever without its limit.
            async with asyncio.timeout(PROBE_S + 60.0 * PATIENCE):
                await driver.create(made)
            if (await driver.get(made.instance_id)).runtime.startswith("firecracker"):
                pytest.skip("this machine's KVM runs Linux guests, as a boot probe has shown: see tests/kvm")
            found, reason = await run(driver, node)
        # Another agent: it would wait an hour, did it probe again.
        async with choosing(node, timeout_s=3600.0) as driver:
            again = await run(driver, node)

        assert found.startswith("qemu ")
        assert found.endswith("(tcg)")
        assert reason == f"firecracker 1.12.1 did not make {node.kernel} say anything within {PROBE_S:g} s"
        assert again == (found, reason)
        # The guest that hung is gone.
        assert not list((node.config.data_dir / "probes").iterdir())
        assert node.leftovers() == {}
