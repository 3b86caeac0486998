"""Nodes through the whole control plane: joining, heartbeats, observations, cordoning, leaving."""

from dataclasses import replace

import pytest

from hvtest_agent import MemoryAgents
from hvtest_control_plane import add_node, control_plane, draft, fake_driver, mutation, registration, until
from hypervisor.core.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted
from hypervisor.core.model import InstanceStats, InstancesUsage, NodeResources
from hypervisor.core.states import InstanceStatus, NodeStatus, OperationState
from hypervisor.server import keys
from hypervisor.server.services import InstanceRef, StopOptions
from hypervisor.server.store.storage import Storage

_AT_ONCE = StopOptions(grace_s=0.0)


async def test_heartbeats_write_nothing_to_the_store(storage: Storage) -> None:
    joining = registration(fencing=None)
    async with control_plane(storage, MemoryAgents()) as plane:
        node, times = await plane.nodes.register(joining)
        await until(lambda: plane.reconciler.leading)
        before = await storage.current_revision()
        sample = InstanceStats(sampled_at=node.value.created_at, cpu_usage_ns=5)

        used = NodeResources(
            cpu_millis=joining.resources.cpu_millis,
            cpu_used_millis=1500,
            memory_bytes=joining.resources.memory_bytes,
            disk_bytes=joining.resources.disk_bytes,
        )
        theirs = InstancesUsage(running=1, sampled=1, cpu_used_cores=0.5)
        for _ in range(5):
            await plane.nodes.heartbeat(joining.id, joining.incarnation, used, {"i-1": sample}, usage=theirs)

        known = plane.nodes.usage(joining.id)
        assert known is not None
        assert (known.resources, known.instances, known.age_s < 5) == (used, theirs, True)
        assert times.timeout_s == 1.0
        assert await storage.current_revision() == before


async def test_samples_a_heartbeat_leaves_out_are_kept_while_the_instance_is_placed_there(
    storage: Storage,
) -> None:
    joining = registration()
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, joining):
        ids = []
        for name in ("one", "two"):
            done = await plane.instances.create(draft(name), mutation())
            ids.append(done.value.object_id)
        one, two = ids
        moment = plane.nodes.resolve(joining.id).value.created_at

        async def beat(running: int, *told: str) -> None:
            samples = {i: InstanceStats(sampled_at=moment, pids=len(told)) for i in told}
            usage = InstancesUsage(running=running)
            await plane.nodes.heartbeat(
                joining.id, joining.incarnation, joining.resources, samples, usage=usage
            )

        def known() -> list[int | None]:
            found = (plane.instances.last_stats(i) for i in ids)
            return [None if sample is None else sample.pids for sample in found]

        await beat(2, one, two)
        await beat(2, one)
        assert known() == [1, 2]

        await beat(1, one)
        assert known() == [1, None]


async def test_a_changed_capacity_is_recorded(storage: Storage) -> None:
    joining = registration(cpu_cores=2)
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, joining):
        larger = NodeResources(cpu_millis=8000, memory_bytes=joining.resources.memory_bytes, disk_bytes=1)

        await plane.nodes.heartbeat(joining.id, joining.incarnation, larger, {}, usage=InstancesUsage())

        assert plane.nodes.resolve(joining.id).value.capacity.cpu_millis == 8000


async def test_heartbeats_of_others_are_refused(storage: Storage) -> None:
    joining = registration()
    async with control_plane(storage, MemoryAgents()) as plane:
        await plane.nodes.register(joining)
        with pytest.raises(NotFound) as unknown:
            await plane.nodes.heartbeat("n-unknown", "x", joining.resources, {}, usage=InstancesUsage())
        with pytest.raises(FailedPrecondition) as replaced:
            await plane.nodes.heartbeat(joining.id, "another", joining.resources, {}, usage=InstancesUsage())
        await until(lambda: not plane.view.node_alive(joining.id))
        with pytest.raises(FailedPrecondition) as ended:
            await plane.nodes.heartbeat(
                joining.id, joining.incarnation, joining.resources, {}, usage=InstancesUsage()
            )
        reasons = [e.value.reason for e in (unknown, replaced, ended)]
        assert reasons == ["NODE_NOT_FOUND", "INCARNATION_MISMATCH", "LEASE_ENDED"]

        await plane.nodes.register(joining)

        await plane.nodes.heartbeat(
            joining.id, joining.incarnation, joining.resources, {}, usage=InstancesUsage()
        )


async def test_a_living_node_keeps_its_hostname_and_its_id(storage: Storage) -> None:
    joining = registration("alpha")
    async with control_plane(storage, MemoryAgents()) as plane:
        async with add_node(plane, joining):
            with pytest.raises(AlreadyExists) as taken:
                await plane.nodes.register(registration("alpha"))
            with pytest.raises(FailedPrecondition) as used:
                await plane.nodes.register(replace(joining, incarnation="copy", port=50053))
            assert (taken.value.reason, used.value.reason) == ("HOSTNAME_TAKEN", "NODE_ID_IN_USE")

            restarted, _ = await plane.nodes.register(replace(joining, incarnation="second start"))
            assert restarted.value.incarnation == "second start"
            await plane.nodes.register(joining)
        await until(lambda: not plane.view.node_alive(joining.id))

        heir, _ = await plane.nodes.register(registration("alpha"))

        assert plane.nodes.resolve(heir.value.id).value.hostname == "alpha"


async def test_an_exit_nobody_asked_for_is_recorded(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        for name in ("good", "bad"):
            await plane.instances.create(draft(name), mutation())
        good, bad = (plane.instances.resolve(InstanceRef(n)).value.id for n in ("good", "bad"))
        agent = agents.by_node[joining.id]
        old = agent.observe(bad)
        observations = (agent.end(good, exit_code=0), agent.end(bad, exit_code=137))

        unexpected = await plane.nodes.update_status(
            joining.id, joining.incarnation, drivers=None, observations=observations
        )
        await plane.nodes.update_status(joining.id, joining.incarnation, drivers=None, observations=(old,))

        ended = [plane.instances.resolve(InstanceRef(n)).value for n in ("good", "bad")]
        assert unexpected == ()
        assert [(i.status, i.status_reason, i.exit_code) for i in ended] == [
            (InstanceStatus.STOPPED, "", 0),
            (InstanceStatus.FAILED, "EXITED", 137),
        ]


async def test_instances_a_node_should_not_have_are_named(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation())
        known = agents.by_node[joining.id].observe(plane.instances.resolve(InstanceRef("web")).value.id)
        stray = type(known)(
            instance_id="i-stray", generation=1, epoch=1, status=known.status, observed_at=known.observed_at
        )

        unexpected = await plane.nodes.update_status(
            joining.id, joining.incarnation, drivers=None, observations=(known, stray)
        )

        assert unexpected == ("i-stray",)


async def test_instances_a_restarted_agent_does_not_have_are_lost(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation())
        agents.by_node[joining.id].held.clear()

        await plane.nodes.register(replace(joining, incarnation="second start"))

        await until(lambda: plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.FAILED)
        assert plane.instances.resolve(InstanceRef("web")).value.status_reason == "LOST"
        await plane.nodes.register(joining)


async def test_an_instance_made_while_its_node_registered_is_not_taken_for_lost(storage: Storage) -> None:
    joining = registration()
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation())

        await plane.nodes.register(joining)  # its observations are from before the create

        await until(
            lambda: plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING
        )


async def test_changed_drivers_count_for_the_next_placement(storage: Storage) -> None:
    joining = registration()
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, joining):
        await plane.nodes.update_status(
            joining.id, joining.incarnation, drivers=(fake_driver(available=False),), observations=()
        )

        with pytest.raises(ResourceExhausted, match="told not to work"):
            await plane.instances.create(draft("web"), mutation())


async def test_a_cordoned_node_gets_nothing_new(storage: Storage) -> None:
    joining = registration()
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, joining):
        done = await plane.nodes.cordon("node-1", mutation("r-1"), reason="new disk", resource_version=0)
        again = await plane.nodes.cordon("node-1", mutation("r-1"), reason="new disk", resource_version=0)
        cordoned = plane.nodes.resolve("node-1").value
        assert (done.value.state, done.value.verb) == (OperationState.SUCCEEDED, "cordon")
        assert again == done
        assert (cordoned.status, cordoned.schedulable) == (NodeStatus.MAINTENANCE, False)
        assert cordoned.status_message == "new disk"
        with pytest.raises(ResourceExhausted, match="is cordoned: new disk"):
            await plane.instances.create(draft("web"), mutation())
        await plane.nodes.register(joining)
        assert plane.nodes.resolve("node-1").value.status is NodeStatus.MAINTENANCE

        await plane.nodes.uncordon(joining.id, mutation(), resource_version=0)

        assert plane.nodes.resolve("node-1").value.status is NodeStatus.READY
        await plane.instances.create(draft("web"), mutation())


async def test_a_node_leaves_when_it_is_empty_and_dead(storage: Storage) -> None:
    joining = registration()
    async with control_plane(storage, MemoryAgents()) as plane:
        async with add_node(plane, joining):
            with pytest.raises(FailedPrecondition) as alive:
                await plane.nodes.deregister("node-1", mutation(), resource_version=0)
            await plane.instances.create(draft("web"), mutation())
            with pytest.raises(FailedPrecondition) as full:
                await plane.nodes.deregister("node-1", mutation(), resource_version=0)
            await plane.instances.stop(InstanceRef("web"), mutation(), options=_AT_ONCE)
            await plane.instances.delete(InstanceRef("web"), mutation(), options=_AT_ONCE, force=False)
        await until(lambda: plane.nodes.resolve("node-1").value.status is NodeStatus.OFFLINE)

        gone = await plane.nodes.deregister("node-1", mutation(), resource_version=0)

        assert (alive.value.reason, full.value.reason) == ("NODE_READY", "NODE_HAS_INSTANCES")
        assert gone.value.object_name == "node-1"
        with pytest.raises(NotFound):
            plane.nodes.resolve("node-1")
        left = [i.key for i in (await storage.list(keys.PREFIX)).items if joining.id in i.key]
        assert left == []


async def test_what_was_measured_on_a_node_is_forgotten_by_every_server_when_it_leaves(
    storage: Storage,
) -> None:
    agents, joining = MemoryAgents(), registration()
    async with (
        control_plane(storage, agents) as one,
        control_plane(storage, agents, server_id="s-2") as other,
    ):
        await one.nodes.register(joining)
        await until(lambda: other.view.node_alive(joining.id))
        await other.nodes.heartbeat(
            joining.id, joining.incarnation, joining.resources, {}, usage=InstancesUsage()
        )
        await until(lambda: not one.view.node_alive(joining.id))
        assert other.nodes.usage(joining.id) is not None

        await one.nodes.deregister(joining.id, mutation(), resource_version=0)

        await until(lambda: other.nodes.usage(joining.id) is None)
