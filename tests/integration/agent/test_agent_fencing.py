"""A node that no server hears from stops what could be started elsewhere: by its agent, by its guard, over restarts."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import until
from hvtest_cluster_double import ClusterDouble
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.fencing.contact import CONTACT, Contact, ContactFile, boot_id
from hypervisor.agent.fencing.guard import LOCK
from hypervisor.agent.fencing.launching import GuardProcess
from hypervisor.agent.fencing.marks import Marks, marked
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2, node_pb2

StartAgent = Callable[..., Any]
RUNNING, STOPPED = instance_pb2.INSTANCE_STATUS_RUNNING, instance_pb2.INSTANCE_STATUS_STOPPED
STOPS = instance_pb2.Availability(on_partition=instance_pb2.ON_PARTITION_STOP)


@pytest.fixture(autouse=True)
def _no_guard_is_left(tmp_path: Path) -> Iterator[None]:
    """Guards outlive their agents, and stay while there is something to guard."""
    yield
    for lock in tmp_path.rglob(LOCK):
        with suppress(ValueError, ProcessLookupError):
            os.kill(int(lock.read_text("ascii")), signal.SIGKILL)


def _create(availability: instance_pb2.Availability | None = STOPS) -> agent_pb2.CreateInstanceRequest:
    return agent_pb2.CreateInstanceRequest(
        ref=agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=1),
        name="web",
        project="default",
        type=instance_pb2.INSTANCE_TYPE_CONTAINER,
        spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64, availability=availability),
        start=True,
    )


async def _status(agent: Any, instance_id: str) -> int:
    found = await agent.stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest())
    return next(o.status for o in found.instances if o.instance_id == instance_id)


async def _until_status(agent: Any, instance_id: str, status: int) -> None:
    async with asyncio.timeout(10):
        while await _status(agent, instance_id) != status:  # noqa: ASYNC110 - it is to be asked for
            await asyncio.sleep(0.01)


async def test_without_a_server_only_what_asks_for_it_is_stopped_and_nothing_of_it_is_started(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        stops, stays = _create(), _create(None)
        await agent.stub.CreateInstance(stops)
        await agent.stub.CreateInstance(stays)
        assert server.nodes[agent.node_id].node.fencing.state == node_pb2.FENCING_STATE_FENCED

        await server.stop()
        await _until_status(agent, stops.ref.id, STOPPED)

        assert await _status(agent, stays.ref.id) == RUNNING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.stub.StartInstance(agent_pb2.StartInstanceRequest(ref=stops.ref))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError, match="no server has heard"):
            await agent.stub.CreateInstance(_create())

        known = server.nodes[agent.node_id]
        before = len(known.heartbeats)
        await server.start()
        told = await until(lambda: _told(known.instances, stops.ref.id), what="the end is told")
        assert told.reason == "FENCED"
        await until(
            lambda: any(b.fencing.state == node_pb2.FENCING_STATE_ARMED for b in known.heartbeats[before:]),
            what="it is armed again",
        )
        await agent.stub.StartInstance(agent_pb2.StartInstanceRequest(ref=stops.ref))
        assert await _status(agent, stops.ref.id) == RUNNING


def _told(instances: Any, instance_id: str) -> Any:
    seen = instances.get(instance_id)
    return seen if seen is not None and seen.status == STOPPED else None


async def test_all_are_stopped_at_once(server: ClusterDouble, start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        stops = [_create() for _ in range(20)]
        for one in stops:
            await agent.stub.CreateInstance(one)

        await server.stop()

        for one in stops:
            await _until_status(agent, one.ref.id, STOPPED)


async def test_an_agent_that_starts_without_a_server_stops_what_outlived_the_lease(
    server: ClusterDouble, start_agent: StartAgent, tmp_path: Path
) -> None:
    # The guests of this driver outlive the agent, as real ones do.
    driver = FakeDriver(FakeConfig(state_dir=tmp_path / "guests"), clock=SystemClock())
    async with start_agent(driver=driver) as agent:
        one = _create()
        await agent.stub.CreateInstance(one)
        node_id = agent.node_id
    time.sleep(1.6)  # noqa: ASYNC251 (the lease ends; nothing else is to run meanwhile)
    assert (await driver.get(one.ref.id)).status == "running"

    server.refuse += [_unavailable() for _ in range(4)]
    async with start_agent(driver=driver):
        seen = await until(
            lambda: _told(server.nodes[node_id].instances, one.ref.id), what="it was stopped", timeout_s=20
        )

    assert seen.reason == "FENCED"


def _unavailable() -> Any:
    from hypervisor.core.errors import Unavailable

    return Unavailable("away")


async def test_fencing_that_servers_have_switched_off_stops_nothing(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    server.disarmed = True
    async with start_agent() as agent:
        one = _create()
        await agent.stub.CreateInstance(one)
        known = server.nodes[agent.node_id]
        await until(
            lambda: any(b.fencing.state == node_pb2.FENCING_STATE_DISARMED for b in known.heartbeats),
            what="the agent knows",
        )

        await server.stop()
        await asyncio.sleep(1.7)  # longer than the lease
        assert await _status(agent, one.ref.id) == RUNNING
        await server.start()


async def test_marks_go_with_their_instances(
    server: ClusterDouble, start_agent: StartAgent, tmp_path: Path
) -> None:
    async with start_agent() as agent:
        one = _create()
        await agent.stub.CreateInstance(one)
        await agent.stub.CreateInstance(_create(None))
        assert marked(tmp_path / "agent") == {one.ref.id}

        await agent.stub.DeleteInstance(agent_pb2.DeleteInstanceRequest(ref=one.ref))

        assert marked(tmp_path / "agent") == frozenset()


@pytest.fixture(autouse=True)
def _leases_that_a_busy_machine_keeps(server: ClusterDouble) -> None:
    """A third of the time that a lease lives."""
    server.interval_s = 0.5


@pytest.fixture
def guest() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A process that looks like a virtual machine of an instance."""
    instance_id = new_id("i")
    # sleep takes only times: the id is in the name by which it is called.
    child = subprocess.Popen([f"qemu-system-none -name guest={instance_id}", "3600"], executable="/bin/sleep")
    yield instance_id, child
    with suppress(ProcessLookupError):
        child.kill()
    child.wait()


async def test_the_guard_kills_what_is_marked_when_no_agent_renews_the_lease(
    tmp_path: Path, guest: tuple[str, "subprocess.Popen[bytes]"]
) -> None:
    instance_id, child = guest
    clock = SystemClock()
    contact = ContactFile(tmp_path / CONTACT)
    contact.write(Contact(boot_id(), clock.monotonic() + 3600, disarmed=False))
    marks = Marks(tmp_path)
    marks.add(instance_id)
    guard = GuardProcess(tmp_path)
    await guard.ensure()
    assert guard.trouble == ""
    try:
        assert child.poll() is None

        contact.write(Contact(boot_id(), clock.monotonic() - 10, disarmed=True))
        time.sleep(1.0)  # noqa: ASYNC251 (it looks four times a second)
        assert child.poll() is None
        contact.write(Contact(boot_id(), clock.monotonic(), disarmed=False))

        assert child.wait(timeout=20) == -9
    finally:
        await guard.end()
        contact.close()


async def test_a_guard_that_dies_is_replaced(tmp_path: Path) -> None:
    guard = GuardProcess(tmp_path)
    await guard.ensure()
    first = guard.pid
    assert first is not None
    try:
        await guard.ensure()
        assert guard.pid == first

        os.kill(first, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{first}/stat").exists() or _is_dead(first), what="it is dead")
        await guard.ensure()

        assert guard.pid not in (None, first)
        again = GuardProcess(tmp_path)
        await again.ensure()
        assert again.pid != guard.pid
        await again.end()
    finally:
        await guard.end()


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def test_a_guard_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    guard = GuardProcess(tmp_path / "not-there")

    await guard.ensure()

    assert "cannot be started" in guard.trouble
