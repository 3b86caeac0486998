"""Saved memory of a microVM survives an agent that dies anywhere between loading it and recording that its guest runs,
and never meets a disk that is newer than itself."""

import asyncio
import os
import signal

import pytest

from hvtest_containerd import eventually
from hvtest_microvm_deaths import die_while
from hvtest_microvms import FirecrackerBench, answer, pid_of, started
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.agent.drivers.microvm.records import RecordStore
from hypervisor.core.states import InstanceStatus


async def suspended(node: FirecrackerBench, micro: MicrovmDriver) -> str:
    """An instance with a disk that has counted to 1, suspended, and no agent."""
    instance_id = await started(micro, node.spec(disk_gb=1))
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.suspend(instance_id)
    await micro.aclose()
    return instance_id


def has_memory(node: FirecrackerBench, instance_id: str) -> bool:
    return (node.config.data_dir / "instances" / instance_id / "suspended").exists()


@pytest.mark.parametrize("step", ["unrecorded", "loading", "loaded", "going on"])
async def test_until_its_guest_runs_it_stays_suspended(
    node: FirecrackerBench, micro: MicrovmDriver, step: str
) -> None:
    instance_id = await suspended(node, micro)

    await asyncio.to_thread(die_while, "start", step, instance_id, config=node.config, vmm=node.vmm())

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert (seen.status, seen.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
    await other.start(instance_id)
    await answer(other, instance_id, "c", "COUNT 1\r\n")
    assert not has_memory(node, instance_id)
    assert len(node.processes()) == 1
    await other.delete(instance_id)
    await other.aclose()
    assert node.leftovers() == {}


@pytest.mark.parametrize("step", ["running", "recorded"])
async def test_once_its_guest_runs_it_goes_on_and_the_memory_goes(
    node: FirecrackerBench, micro: MicrovmDriver, step: str
) -> None:
    instance_id = await suspended(node, micro)

    await asyncio.to_thread(die_while, "start", step, instance_id, config=node.config, vmm=node.vmm())
    pid = pid_of(node, instance_id)

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert seen.status is InstanceStatus.RUNNING
    assert seen.started_at is not None
    assert pid_of(node, instance_id) == pid
    await answer(other, instance_id, "c", "COUNT 1\r\n")
    await other.stop(instance_id, grace_s=0.0)
    # From the beginning: its memory was used up.
    await other.start(instance_id)
    await answer(other, instance_id, "c", "COUNT 0\r\n")
    await other.suspend(instance_id)
    await other.delete(instance_id)
    await other.aclose()
    assert node.leftovers() == {}


async def test_a_guest_that_may_have_run_does_not_go_back_to_its_old_memory(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await suspended(node, micro)
    await asyncio.to_thread(die_while, "start", "running", instance_id, config=node.config, vmm=node.vmm())
    pid = pid_of(node, instance_id)
    os.kill(pid, signal.SIGKILL)

    eventually(lambda: pid not in {run.pid for run in node.processes()}, what="the VMM has ended")

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert seen.status is InstanceStatus.FAILED
    assert not has_memory(node, instance_id)
    await other.start(instance_id)
    await answer(other, instance_id, "c", "COUNT 0\r\n")
    await other.delete(instance_id)
    await other.aclose()


async def test_a_suspend_whose_agent_died_before_the_guest_ended_is_finished(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.spec(disk_gb=1))
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.aclose()

    await asyncio.to_thread(die_while, "suspend", "saved", instance_id, config=node.config, vmm=node.vmm())

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert (seen.status, seen.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
    assert node.processes() == ()
    (record,) = RecordStore(node.config.data_dir).load()
    assert (record.suspended, record.run) == (True, None)
    await other.start(instance_id)
    await answer(other, instance_id, "c", "COUNT 1\r\n")
    await other.delete(instance_id)
    await other.aclose()
