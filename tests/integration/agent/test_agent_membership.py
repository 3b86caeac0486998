"""The agent and the control plane: registration, heartbeats, fail-over, reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvtest_agent_waiting import until
from hvtest_cluster_double import ClusterDouble
from hypervisor.agent.drivers.driver import VERBS
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import AlreadyExists, FailedPrecondition, Unavailable
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2, node_pb2

StartAgent = Callable[..., Any]


def _create(command: tuple[str, ...] = ()) -> agent_pb2.CreateInstanceRequest:
    return agent_pb2.CreateInstanceRequest(
        ref=agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=1),
        name="web",
        project="default",
        type=instance_pb2.INSTANCE_TYPE_CONTAINER,
        spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64, command=command),
        start=True,
    )


async def test_registration_says_what_the_node_is_and_has(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent():
        (registration,) = server.registrations

    node = registration.node
    assert (node.hostname, node.zone, dict(node.labels)) == ("node-1", "zone-a", {"disk": "ssd"})
    assert (node.role, node.agent_version) == (node_pb2.NODE_ROLE_WORKER, "1.2.3")
    assert node.resources.cpu_cores >= 1
    assert node.resources.memory_bytes > node.resources.memory_used > 0
    assert node.resources.disk_bytes >= node.resources.disk_used > 0
    (driver,) = node.drivers
    assert driver.available
    assert {c.verb for c in driver.capabilities} == set(VERBS)


async def test_heartbeats_come_at_the_servers_interval_with_resources_and_samples(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        created = await agent.stub.CreateInstance(_create())
        known = server.nodes[agent.node_id]
        instance_id = created.instance.instance_id

        def told() -> list[int]:
            return [b.stats[instance_id].cpu_usage_ns for b in known.heartbeats if instance_id in b.stats]

        await until(lambda: len(set(told())) >= 2, what="samples arrive")

        assert told() == sorted(told())
        assert (known.heartbeats[-1].usage.running, known.heartbeats[-1].usage.sampled) == (1, 1)
        assert known.heartbeats[-1].usage.memory_used_bytes > 0
        assert all(beat.resources.cpu_cores >= 1 for beat in known.heartbeats)


async def test_heartbeats_go_over_one_stream(server: ClusterDouble, start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        known = server.nodes[agent.node_id]
        await until(lambda: len(known.heartbeats) >= 4, what="heartbeats arrive")

        assert server.heartbeat_streams == 1


async def test_heartbeats_are_single_calls_to_a_server_that_is_too_old_for_the_stream(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    await server.stop()
    server.streams_heartbeats = False
    await server.start()
    async with start_agent() as agent:
        known = server.nodes[agent.node_id]
        await until(lambda: len(known.heartbeats) >= 2, what="heartbeats arrive")

        assert (len(server.registrations), server.heartbeat_streams) == (1, 0)


async def test_a_stream_of_heartbeats_that_broke_is_opened_again(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        known = server.nodes[agent.node_id]
        await until(lambda: known.heartbeats, what="heartbeats arrive")
        server.refuse.append(Unavailable("the store is down", reason="STORE_UNAVAILABLE"))
        await until(lambda: not server.refuse, what="a call is refused")
        before = len(known.heartbeats)

        await until(lambda: len(known.heartbeats) > before, what="heartbeats arrive again")

        assert (len(server.registrations), server.heartbeat_streams) == (1, 2)


async def test_the_node_keeps_its_id_and_gets_a_new_incarnation_with_each_start(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    for _ in range(2):
        async with start_agent():
            pass

    first, second = server.registrations
    assert first.node.id == second.node.id
    assert first.incarnation != second.incarnation


async def test_a_forgotten_node_registers_again_with_its_instances(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        created = await agent.stub.CreateInstance(_create())

        server.forget()
        await until(lambda: len(server.registrations) == 2, what="the agent registers again")

        assert [o.instance_id for o in server.registrations[1].instances] == [created.instance.instance_id]


async def test_an_ended_lease_makes_the_agent_register_again(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent():
        server.refuse.append(FailedPrecondition("the lease ended", reason="LEASE_ENDED"))

        await until(lambda: len(server.registrations) == 2, what="the agent registers again")


async def test_a_refused_registration_is_tried_again(server: ClusterDouble, start_agent: StartAgent) -> None:
    server.refuse += [AlreadyExists("host name taken", reason="HOSTNAME_TAKEN") for _ in range(2)]

    async with start_agent():
        assert len(server.registrations) == 1


async def test_an_exit_is_reported_at_once(server: ClusterDouble, start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        created = await agent.stub.CreateInstance(_create())
        instance_id = created.instance.instance_id

        await agent.driver.exit(instance_id, 3)

        known = server.nodes[agent.node_id]
        seen = await until(
            lambda: known.instances.get(instance_id), what="the exit is reported", timeout_s=2.0
        )
        assert (seen.status, seen.reason, seen.exit_code) == (
            instance_pb2.INSTANCE_STATUS_FAILED,
            "EXITED",
            3,
        )
        assert seen.sequence > created.instance.sequence


async def test_a_report_is_repeated_until_it_is_delivered(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        created = await agent.stub.CreateInstance(_create())
        instance_id = created.instance.instance_id
        server.refuse += [Unavailable("the store is down", reason="STORE_UNAVAILABLE") for _ in range(3)]

        await agent.driver.exit(instance_id, 3)

        known = server.nodes[agent.node_id]
        await until(lambda: instance_id in known.instances, what="the exit is reported")


async def test_the_node_works_on_while_no_server_is_there_and_reports_afterwards(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        created = await agent.stub.CreateInstance(_create())
        instance_id = created.instance.instance_id
        await server.stop()

        other = await agent.stub.CreateInstance(_create())
        await agent.driver.exit(instance_id, 4)
        assert other.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING
        await server.start()

        known = server.nodes[agent.node_id]
        seen = await until(
            lambda: known.instances.get(instance_id), what="the exit is reported", timeout_s=20.0
        )
        assert seen.exit_code == 4


async def test_the_next_server_is_used_when_one_is_gone(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with ClusterDouble() as second, start_agent(servers=(server.address, second.address)) as agent:
        assert second.registrations == []

        await server.stop()

        await until(
            lambda: second.registrations, what="the agent registers at the second server", timeout_s=20.0
        )
        known = second.nodes[agent.node_id]
        await until(lambda: known.heartbeats, what="heartbeats go to the second server")


async def test_a_driver_that_dies_and_comes_back_is_reported(
    server: ClusterDouble, start_agent: StartAgent
) -> None:
    async with start_agent() as agent:
        known = server.nodes[agent.node_id]

        agent.driver.faults.lose_runtime("containerd is not running")
        await until(lambda: not known.node.drivers[0].available, what="the loss is reported")
        assert "containerd is not running" in known.node.drivers[0].reason
        agent.driver.faults.restore_runtime()

        await until(lambda: known.node.drivers[0].available, what="the return is reported")


async def test_an_orderly_end_leaves_instances_running_and_the_node_registered(
    server: ClusterDouble, start_agent: StartAgent, tmp_path: Path
) -> None:
    async with start_agent() as agent:
        created = await agent.stub.CreateInstance(_create())
        node_id = agent.node_id

    assert node_id in server.nodes
    async with start_agent() as agent:
        (seen,) = server.registrations[-1].instances
        assert seen.instance_id == created.instance.instance_id
        assert seen.status == instance_pb2.INSTANCE_STATUS_RUNNING
        assert seen.started_at == created.instance.started_at
