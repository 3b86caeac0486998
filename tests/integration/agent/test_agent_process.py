"""The agent as a process: killed at any moment, and as many simulated ones."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble
from hypervisor.agent.v1 import agent_pb2, agent_pb2_grpc
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2

RUNNING = instance_pb2.INSTANCE_STATUS_RUNNING


class AgentProcess:
    """One ``hypervisor-agent``; its log is parsed as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.events: list[dict[str, object]] = []

    async def read_log(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            try:
                self.events.append(json.loads(line))
            except json.JSONDecodeError:
                self.events.append({"event": line.decode("utf-8", "replace")})

    def named(self, event: str) -> list[dict[str, object]]:
        return [e for e in self.events if e["event"] == event]

    def kill(self) -> None:
        self._process.kill()

    async def end(self) -> int:
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        return await within(self._process.wait(), what="the agent ends", timeout_s=20.0)

    async def ended(self) -> int:
        return await within(self._process.wait(), what="the agent ends", timeout_s=20.0)


@asynccontextmanager
async def _agent(
    data_dir: Path, server: ClusterDouble, *more: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[AgentProcess]:
    settings = {
        "agent.data_dir": str(data_dir),
        "agent.server_address": server.address,
        "agent.port": "0",
        "agent.shutdown_grace": "2s",
        "drivers.enabled": "fake",
        "metrics.address": "127.0.0.1:0",
        "drivers.health_interval": "200ms",
        "node.hostname": "node-1",
        "log.format": "json",
    }
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hypervisor.agent",
        *flags,
        *more,
        stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if not k.startswith("HYPERVISOR_")}
        | dict(environment or {}),
    )
    agent = AgentProcess(process)
    reading = asyncio.ensure_future(agent.read_log())
    try:
        yield agent
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


@asynccontextmanager
async def _stub(server: ClusterDouble) -> AsyncIterator["agent_pb2_grpc.AgentServiceAsyncStub"]:
    port = server.registrations[-1].node.port
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield agent_pb2_grpc.AgentServiceStub(channel)


def _create(instance_id: str, command: Sequence[str] = ()) -> agent_pb2.CreateInstanceRequest:
    return agent_pb2.CreateInstanceRequest(
        ref=agent_pb2.InstanceRef(id=instance_id, generation=1, epoch=1),
        name="web",
        project="default",
        type=instance_pb2.INSTANCE_TYPE_CONTAINER,
        spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64, command=command),
        start=True,
    )


async def _registered(server: ClusterDouble, times: int) -> None:
    await until(lambda: len(server.registrations) >= times, what="the agent registers", timeout_s=20.0)


@pytest.fixture
async def cluster() -> AsyncIterator[ClusterDouble]:
    async with ClusterDouble() as double:
        yield double


@pytest.mark.parametrize(("pure", "live"), [("", "native"), ("1", "python")])
async def test_the_log_says_which_implementation_of_the_extension_is_live(
    tmp_path: Path, cluster: ClusterDouble, pure: str, live: str
) -> None:
    async with _agent(tmp_path, cluster, environment={"HYPERVISOR_EXT_PURE": pure}) as agent:
        await until(lambda: agent.named("agent_ready"), what="the agent starts", timeout_s=20.0)

    (starting,) = agent.named("agent_starting")
    assert (starting["stats_sampler"], starting["console_mux"]) == (live, live)


async def test_kill_9_leaves_instances_running_and_the_next_agent_adopts_them(
    tmp_path: Path, cluster: ClusterDouble
) -> None:
    ids = [new_id("i") for _ in range(5)]
    async with _agent(tmp_path, cluster) as agent:
        await _registered(cluster, 1)
        async with _stub(cluster) as stub:
            created = [await stub.CreateInstance(_create(i)) for i in ids]
        agent.kill()
        assert await agent.ended() == -signal.SIGKILL
    async with _agent(tmp_path, cluster) as agent:
        await _registered(cluster, 2)
        async with _stub(cluster) as stub:
            repeated = await stub.CreateInstance(_create(ids[0]))
            stopped = await stub.StopInstance(
                agent_pb2.StopInstanceRequest(ref=agent_pb2.InstanceRef(id=ids[1], generation=1, epoch=1))
            )
        assert await agent.end() == 0

    first, second = cluster.registrations
    assert second.node.id == first.node.id
    assert second.incarnation != first.incarnation
    adopted = {o.instance_id: o for o in second.instances}
    assert {i: adopted[i].status for i in ids} == dict.fromkeys(ids, RUNNING)
    for before in (reply.instance for reply in created):
        assert adopted[before.instance_id].started_at == before.started_at
        assert adopted[before.instance_id].sequence > before.sequence
    assert repeated.instance.started_at == created[0].instance.started_at
    assert stopped.instance.status == instance_pb2.INSTANCE_STATUS_STOPPED


async def test_kill_9_amid_many_creates_loses_and_doubles_none(
    tmp_path: Path, cluster: ClusterDouble
) -> None:
    ids = [new_id("i") for _ in range(60)]
    answered: dict[str, agent_pb2.InstanceReply] = {}

    async with _agent(tmp_path, cluster) as agent:
        await _registered(cluster, 1)
        async with _stub(cluster) as stub:

            async def create(instance_id: str) -> None:
                try:
                    answered[instance_id] = await stub.CreateInstance(_create(instance_id))
                except grpc.aio.AioRpcError:
                    return
                if len(answered) == 20:
                    agent.kill()

            await asyncio.gather(*(create(i) for i in ids))
        await agent.ended()
    async with _agent(tmp_path, cluster) as agent:
        await _registered(cluster, 2)
        async with _stub(cluster) as stub:
            again = await asyncio.gather(*(stub.CreateInstance(_create(i)) for i in ids))
            listed = await stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest())
        assert await agent.end() == 0

    assert len(answered) >= 20
    by_id = {reply.instance.instance_id: reply.instance for reply in again}
    assert {seen.status for seen in by_id.values()} == {RUNNING}
    for instance_id, reply in answered.items():
        assert by_id[instance_id].started_at == reply.instance.started_at
    assert sorted(o.instance_id for o in listed.instances) == sorted(ids)


async def test_sigterm_ends_in_order_and_instances_run_on(tmp_path: Path, cluster: ClusterDouble) -> None:
    instance_id = new_id("i")
    async with _agent(tmp_path, cluster) as agent:
        await _registered(cluster, 1)
        async with _stub(cluster) as stub:
            await stub.CreateInstance(_create(instance_id))
        assert await agent.end() == 0
        assert agent.named("agent_stopped")
    async with _agent(tmp_path, cluster):
        await _registered(cluster, 2)

    assert [o.status for o in cluster.registrations[1].instances] == [RUNNING]


async def test_a_second_agent_on_one_data_directory_is_refused_and_the_first_goes_on(
    tmp_path: Path, cluster: ClusterDouble
) -> None:
    instance_id = new_id("i")
    async with _agent(tmp_path, cluster):
        await _registered(cluster, 1)
        async with _stub(cluster) as stub:
            await stub.CreateInstance(_create(instance_id))
            async with _agent(tmp_path, cluster) as second:
                assert await second.ended() == 1
            (kept,) = (await stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest())).instances
    (failed,) = second.named("agent_failed")
    assert failed["reason"] == "DATA_DIR_IN_USE"
    assert str(tmp_path) in str(failed["error"])
    assert "stop it, or give this one a directory of its own" in str(failed["error"])
    assert (kept.instance_id, kept.status) == (instance_id, RUNNING)
    assert len(cluster.registrations) == 1


@pytest.mark.parametrize(("driver", "section"), [("microvm", "microvm"), ("vm", "libvirt")])
async def test_a_second_agent_on_the_directory_of_anothers_machines_is_refused(
    tmp_path: Path, cluster: ClusterDouble, driver: str, section: str
) -> None:
    """Its own data directory is another one: it would take the other's guests for its own."""
    flags = [
        *("--set", f"drivers.enabled={driver}", "--set", "libvirt.uri=test:///default"),
        *("--set", f"{section}.data_dir={tmp_path}/machines", "--set", f"microvm.run_dir={tmp_path}/run"),
    ]
    async with _agent(tmp_path / "first", cluster, *flags) as first:
        await _registered(cluster, 1)
        async with _agent(tmp_path / "second", cluster, *flags) as second:
            assert await second.ended() == 1
        assert await first.end() == 0
    async with _agent(tmp_path / "second", cluster, *flags, "--set", "node.hostname=node-2"):
        await _registered(cluster, 2)

    (failed,) = second.named("agent_failed")
    assert failed["reason"] == "DATA_DIR_IN_USE"
    assert f"{section}.data_dir {tmp_path}/machines is in use by another agent" in str(failed["error"])


async def test_a_directory_for_machines_that_cannot_be_made_does_not_keep_the_agent_from_the_rest(
    tmp_path: Path, cluster: ClusterDouble
) -> None:
    (tmp_path / "file").touch()
    flags = ("--set", "drivers.enabled=microvm", "--set", f"microvm.data_dir={tmp_path}/file/machines")
    async with _agent(tmp_path / "data", cluster, *flags) as agent:
        await _registered(cluster, 1)
        assert await agent.end() == 0

    (warned,) = agent.named("driver_directory_unusable")
    assert "microvm.data_dir" in str(warned["error"])


async def test_a_port_in_use_is_named(tmp_path: Path, cluster: ClusterDouble) -> None:
    port = cluster.address.rpartition(":")[2]

    async with _agent(tmp_path, cluster, "--set", f"agent.port={port}") as agent:
        assert await agent.ended() == 1
    (failed,) = agent.named("agent_failed")
    assert failed["reason"] == "ADDRESS_UNUSABLE"
    assert port in str(failed["error"])


async def test_simulated_nodes_are_nodes_of_their_own(tmp_path: Path, cluster: ClusterDouble) -> None:
    async with _agent(tmp_path, cluster, "--simulated", "5") as agent:
        await until(lambda: len(cluster.nodes) == 5, what="all register", timeout_s=20.0)
        await until(
            lambda: all(known.heartbeats for known in cluster.nodes.values()), what="all send heartbeats"
        )
        async with _stub(cluster) as stub:
            created = await stub.CreateInstance(_create(new_id("i")))
        assert await agent.end() == 0

    nodes = [known.node for known in cluster.nodes.values()]
    assert sorted(node.hostname for node in nodes) == [f"node-1-{n:04d}" for n in range(1, 6)]
    assert len({node.port for node in nodes}) == 5
    assert all(node.simulated and node.resources.cpu_cores == 8 for node in nodes)
    assert created.instance.status == RUNNING
