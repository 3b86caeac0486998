"""Which VMM runs an instance: a real boot probe decides, its answer is kept, and the reason is told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace as with_config
from pathlib import Path
from types import MappingProxyType

import pytest
from msgspec.structs import replace

from hvtest_containers import until
from hvtest_microvms import FIRECRACKER, JAILER, FirecrackerBench, answer, assignment
from hypervisor.agent.drivers.microvm import FirecrackerVmm, MicrovmDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.machines import MicrovmOptions, VmmChoice
from hypervisor.core.states import InstanceStatus


class Second(FirecrackerVmm):
    """Firecracker again, in the place of the VMM that is taken where Firecracker is not."""

    key = "second"
    choice = VmmChoice.QEMU
    lacks = MappingProxyType({"snapshot-diff": "the second keeps whole ones only"})

    async def version(self) -> str:
        return "second 1.0"


@asynccontextmanager
async def choosing(
    node: FirecrackerBench,
    *,
    kernel: Path | None,
    program: Path = FIRECRACKER,
    vmm: VmmChoice = VmmChoice.AUTO,
    timeout_s: float = 20.0,
) -> AsyncIterator[MicrovmDriver]:
    config = with_config(node.config, kernel=kernel, vmm=vmm, probe_timeout_s=timeout_s)
    vmms = (
        FirecrackerVmm(program, jailer=JAILER, clock=SystemClock()),
        Second(FIRECRACKER, jailer=JAILER, clock=SystemClock()),
    )
    driver = MicrovmDriver(config, vmms, clock=SystemClock(), new_id=new_id)
    try:
        yield driver
        for seen in await driver.list():
            await driver.delete(seen.instance_id)
    finally:
        await driver.aclose()


def mute(node: FirecrackerBench) -> Path:
    """A kernel that halts at once, as one hangs where the node's KVM cannot run it."""
    data = bytearray(node.kernel.read_bytes())
    data[0x1000:0x1003] = b"\xf4\xeb\xfd"
    path = node.images / "mute"
    path.write_bytes(data)
    return path


async def runtime(driver: MicrovmDriver, node: FirecrackerBench, wanted: VmmChoice) -> tuple[str, str]:
    """What an instance is told to run in, and why."""
    made = assignment(node.spec(options=MicrovmOptions(vmm=wanted)))
    await driver.create(made)
    seen = await driver.start(made.instance_id)
    assert seen.status is InstanceStatus.RUNNING
    await answer(driver, made.instance_id, "echo x", "x\r\nx\r\n")
    return seen.runtime, seen.runtime_reason


async def test_where_a_probe_boots_its_kernel_firecracker_is_taken(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=node.kernel) as driver:
        found, reason = await runtime(driver, node, VmmChoice.AUTO)

    assert found == "firecracker 1.12.1"
    assert "probe has shown" in reason


async def test_where_the_probed_kernel_hangs_the_next_vmm_is_taken_and_the_answer_is_kept(
    node: FirecrackerBench,
) -> None:
    kernel = mute(node)
    async with choosing(node, kernel=kernel, timeout_s=1.0) as driver:
        found, reason = await runtime(driver, node, VmmChoice.AUTO)
    # Another agent: it would wait an hour, did it probe again.
    async with choosing(node, kernel=kernel, timeout_s=3600.0) as driver:
        again = await runtime(driver, node, VmmChoice.AUTO)
        info = await driver.info()

    assert found == "second 1.0"
    assert reason == f"firecracker 1.12.1 did not make {kernel} say anything within 1 s"
    assert again == (found, reason)
    assert info.available
    assert reason in info.reason


async def test_another_kernel_is_probed_anew(node: FirecrackerBench) -> None:
    kernel = mute(node)
    async with choosing(node, kernel=kernel, timeout_s=1.0) as driver:
        await runtime(driver, node, VmmChoice.AUTO)
    kernel.write_bytes(node.kernel.read_bytes())

    async with choosing(node, kernel=kernel) as driver:
        found, _ = await runtime(driver, node, VmmChoice.AUTO)

    assert found == "firecracker 1.12.1"


async def test_what_a_specification_asks_for_needs_no_probe(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=mute(node)) as driver:
        first = await runtime(driver, node, VmmChoice.FIRECRACKER)
        second = await runtime(driver, node, VmmChoice.QEMU)

    assert first == ("firecracker 1.12.1", "spec.microvm.vmm asks for it")
    assert second == ("second 1.0", "spec.microvm.vmm asks for it")
    assert not (node.config.data_dir / "probes.json").exists()


async def test_the_configured_vmm_is_taken_and_a_specification_wins_over_it(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=None, vmm=VmmChoice.QEMU) as driver:
        configured = await runtime(driver, node, VmmChoice.AUTO)
        asked = await runtime(driver, node, VmmChoice.FIRECRACKER)

    assert configured == ("second 1.0", "microvm.vmm is set to it")
    assert asked[0] == "firecracker 1.12.1"


async def test_without_a_kernel_to_probe_with_that_is_the_reason(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=None) as driver:
        found, reason = await runtime(driver, node, VmmChoice.AUTO)

    assert found == "second 1.0"
    assert "machines.kernel" in reason


async def test_a_default_kernel_that_firecracker_cannot_read_is_the_reason(node: FirecrackerBench) -> None:
    kernel = node.images / "vmlinuz"
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(1024))

    async with choosing(node, kernel=kernel) as driver:
        found, reason = await runtime(driver, node, VmmChoice.AUTO)

    assert found == "second 1.0"
    assert "bzImage" in reason
    assert "spec.kernel_path" not in reason


async def test_what_only_an_absent_vmm_could_do_is_not_offered(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=node.kernel) as both:
        whole = await both.info()
    async with choosing(node, kernel=node.kernel, program=Path("/nowhere/firecracker")) as second_alone:
        poor = await second_alone.info()

    assert whole.lacks("snapshot-diff") is None
    lacking = poor.lacks("snapshot-diff")
    assert lacking is not None
    assert lacking.reason == "the second keeps whole ones only"


async def test_a_program_that_is_missing_is_told_and_the_other_vmm_runs(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=node.kernel, program=Path("/nowhere/firecracker")) as driver:
        found, reason = await runtime(driver, node, VmmChoice.AUTO)
        with pytest.raises(Unavailable) as caught:
            await runtime(driver, node, VmmChoice.FIRECRACKER)

    assert found == "second 1.0"
    assert "/nowhere/firecracker" in reason
    assert "microvm.firecracker" in caught.value.message


async def test_while_a_probe_is_under_way_the_driver_says_so_and_creates_wait_for_it(
    node: FirecrackerBench,
) -> None:
    async with choosing(node, kernel=mute(node), timeout_s=1.5) as driver:
        before = await driver.info()
        found, _ = await runtime(driver, node, VmmChoice.AUTO)

    assert before.available
    assert "probed" in before.reason
    assert found == "second 1.0"


async def test_the_default_kernel_is_booted_where_a_specification_names_none(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=node.kernel, vmm=VmmChoice.FIRECRACKER) as driver:
        made = assignment(replace(node.shell(), kernel_path=""))
        await driver.create(made)
        await driver.start(made.instance_id)

        await answer(driver, made.instance_id, "echo default", "default\r\ndefault\r\n")


async def test_a_probe_that_is_cut_off_leaves_nothing(node: FirecrackerBench) -> None:
    async with choosing(node, kernel=mute(node), timeout_s=60.0) as driver:
        await driver.info()

        async def booting() -> bool:
            return "processes" in node.leftovers()

        await until(booting, what="the probe boots")

    assert node.leftovers() == {}
    assert not (node.config.data_dir / "probes.json").exists()
