"""What becomes of instances whose node is lost: placed elsewhere, waiting, held, evacuated, started again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from hvtest_agent import MemoryAgent, MemoryAgents
from hvtest_control_plane import (
    ARMED,
    add_node,
    allocation_is_sum,
    control_plane,
    draft,
    mutation,
    registration,
    until,
)
from hypervisor.core.availability import Availability, FencingState, NodeFencing, OnNodeLoss, OnPartition
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import Instance, InstancesUsage
from hypervisor.core.states import DesiredState, InstanceStatus, NodeStatus, OperationState
from hypervisor.server import keys
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings
from hypervisor.server.services import InstanceRef, NodeRegistration, StopOptions
from hypervisor.server.store.storage import Storage

RESCHEDULE = Availability(on_node_loss=OnNodeLoss.RESCHEDULE, on_partition=OnPartition.STOP)
RESTART = Availability(on_node_loss=OnNodeLoss.RESTART_IN_PLACE)
NEVER = Availability()
STOPS = Availability(on_partition=OnPartition.STOP)


def named(plane: ControlPlane, name: str = "web") -> Instance:
    return plane.instances.resolve(InstanceRef(name)).value


def agent_of(agents: MemoryAgents, plane: ControlPlane, node_id: str) -> MemoryAgent:
    return agents.agent(plane.nodes.resolve(node_id).value)


@asynccontextmanager
async def lost_with(
    storage: Storage,
    agents: MemoryAgents,
    *,
    names: tuple[str, ...] = ("web",),
    availability: Availability = RESCHEDULE,
    lost: NodeRegistration | None = None,
    **spec: object,
) -> AsyncIterator[tuple[ControlPlane, NodeRegistration]]:
    """A control plane whose node ``lost`` had instances and is not heard of any more."""
    joining = lost or registration("lost")
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, joining):
            for name in names:
                await plane.instances.create(draft(name, availability=availability, **spec), mutation())
        agent_of(agents, plane, joining.id).unreachable = True
        yield plane, joining


async def test_an_instance_that_asks_for_it_is_made_anew_on_another_node(storage: Storage) -> None:
    agents = MemoryAgents()
    async with (
        lost_with(storage, agents) as (plane, lost),
        add_node(plane, registration("other")) as other_id,
    ):
        await until(
            lambda: named(plane).status is InstanceStatus.RUNNING and named(plane).node_id == other_id
        )

        moved = named(plane)
        assert (moved.epoch, moved.lost, moved.desired) == (2, None, DesiredState.RUNNING)
        assert agents.by_node[other_id].holds() == {moved.id}
        held = await allocation_is_sum(storage)
        assert (held[lost.id].instances, held[other_id].instances) == (0, 1)
        (operation,) = [o.value for o in plane.view.operations() if o.value.verb == "replace"]
        assert (operation.state, operation.node_id) == (OperationState.SUCCEEDED, other_id)


async def test_nothing_is_moved_before_the_node_has_had_the_time_to_fence_itself(storage: Storage) -> None:
    agents = MemoryAgents()

    def patient(settings: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(settings, losses=replace(settings.losses, margin_s=3600.0))

    joining = registration("lost")
    async with control_plane(storage, agents, change=patient) as plane:
        async with add_node(plane, joining):
            await plane.instances.create(draft("web", availability=RESCHEDULE), mutation())
        async with add_node(plane, registration("other")) as other_id:
            await until(lambda: named(plane).lost is not None and "given time" in named(plane).lost.waiting)  # type: ignore[union-attr]

            assert named(plane).node_id == joining.id
            assert agent_of(agents, plane, other_id).holds() == set()


@pytest.mark.parametrize("availability", [NEVER, RESTART, STOPS])
async def test_others_wait_for_their_node(storage: Storage, availability: Availability) -> None:
    agents = MemoryAgents()
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(control_plane(storage, agents))
        lost = registration("lost", cpu_cores=8)
        async with add_node(plane, lost):
            await plane.instances.create(draft("web", availability=availability), mutation())
            await plane.instances.create(draft("moves", availability=RESCHEDULE), mutation())
        other_id = await stack.enter_async_context(add_node(plane, registration("other")))
        await until(lambda: named(plane, "moves").node_id == other_id)
        await until(lambda: named(plane, "moves").status is InstanceStatus.RUNNING)

        assert (named(plane).node_id, named(plane).epoch) == (lost.id, 1)
        assert named(plane).status is InstanceStatus.UNKNOWN
        assert agents.by_node[other_id].holds() == {named(plane, "moves").id}


@pytest.mark.parametrize(
    "fencing", [None, NodeFencing(state=FencingState.DISARMED, reason="the guard does not run")]
)
async def test_a_node_that_does_not_fence_itself_keeps_its_instances(
    storage: Storage, fencing: NodeFencing | None
) -> None:
    agents = MemoryAgents()
    lost = registration("lost", fencing=fencing)
    async with lost_with(storage, agents, lost=lost) as (plane, _), add_node(plane, registration("other")):
        await until(lambda: "does not fence itself" in named(plane).status_message)

        assert named(plane).node_id == lost.id
        assert "node evacuate" in named(plane).status_message


async def test_one_that_fits_nowhere_waits_and_says_why_and_is_placed_once_there_is_room(
    storage: Storage,
) -> None:
    agents = MemoryAgents()
    async with (
        lost_with(storage, agents, cpu_cores=3) as (plane, _),
        add_node(plane, registration("small", cpu_cores=2)),
    ):
        await until(lambda: "no node fits" in named(plane).status_message)
        waiting = named(plane).lost
        assert waiting is not None
        assert "no node fits" in waiting.waiting

        async with add_node(plane, registration("large", cpu_cores=8)) as large_id:
            await until(lambda: named(plane).status is InstanceStatus.RUNNING, timeout_s=20)

            assert named(plane).node_id == large_id
            await allocation_is_sum(storage)


async def test_an_old_copy_is_deleted_when_its_node_comes_back(storage: Storage) -> None:
    agents = MemoryAgents()
    async with (
        lost_with(storage, agents) as (plane, lost),
        add_node(plane, registration("other")) as other_id,
    ):
        await until(
            lambda: named(plane).status is InstanceStatus.RUNNING and named(plane).node_id == other_id
        )
        back = agents.by_node[lost.id]
        back.unreachable = False
        seen = (back.observe(named(plane).id),)

        async with add_node(plane, replace(lost, observations=seen, incarnation="again")):
            await until(lambda: back.holds() == set())

            assert (named(plane).node_id, named(plane).status) == (other_id, InstanceStatus.RUNNING)
            assert agents.by_node[other_id].holds() == {named(plane).id}


async def test_a_node_that_is_back_in_time_keeps_its_instance(storage: Storage) -> None:
    agents = MemoryAgents()

    def patient(settings: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(settings, losses=replace(settings.losses, margin_s=3600.0))

    joining = registration("lost")
    async with control_plane(storage, agents, change=patient) as plane:
        async with add_node(plane, joining):
            await plane.instances.create(draft("web", availability=RESCHEDULE), mutation())
        await until(lambda: named(plane).status is InstanceStatus.UNKNOWN)
        seen = agents.by_node[joining.id].observe(named(plane).id)

        async with add_node(plane, replace(joining, observations=(seen,))):
            await until(lambda: named(plane).status is InstanceStatus.RUNNING)

            assert (named(plane).epoch, named(plane).lost) == (1, None)
            assert plane.nodes.resolve(joining.id).value.loss is None


@pytest.mark.parametrize(
    ("availability", "reason"),
    [(STOPS, "FENCED"), (RESCHEDULE, "FENCED"), (RESTART, "NODE_RESTARTED")],
)
async def test_what_a_loss_has_ended_is_started_again_when_its_node_is_back(
    storage: Storage, availability: Availability, reason: str
) -> None:
    agents = MemoryAgents()
    joining = registration("lost")
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, joining):
            await plane.instances.create(draft("web", availability=availability), mutation())
        await until(lambda: named(plane).status is InstanceStatus.UNKNOWN)
        agent = agents.by_node[joining.id]
        ended = agent.end(named(plane).id, exit_code=137, reason=reason)

        async with add_node(plane, replace(joining, observations=(ended,), incarnation="again")):
            await until(lambda: named(plane).status is InstanceStatus.RUNNING)

            assert ("start", named(plane).id) in agent.calls
            assert (named(plane).epoch, named(plane).node_id) == (1, joining.id)


async def test_a_restart_of_the_node_starts_nothing_that_does_not_ask_for_it(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration("lost")
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, joining):
            await plane.instances.create(draft("web"), mutation())
        await until(lambda: named(plane).status is InstanceStatus.UNKNOWN)
        ended = agents.by_node[joining.id].end(named(plane).id, exit_code=137, reason="NODE_RESTARTED")
        async with add_node(plane, replace(joining, observations=(ended,), incarnation="again")):
            await until(lambda: named(plane).status is InstanceStatus.FAILED)
            await asyncio.sleep(0.5)

            assert named(plane).status_reason == "NODE_RESTARTED"
            assert ("start", named(plane).id) not in agents.by_node[joining.id].calls


async def test_no_more_are_moved_at_once_than_allowed(storage: Storage) -> None:
    agents = MemoryAgents()

    def two_at_once(settings: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(settings, losses=replace(settings.losses, max_moves=2))

    joining = registration("lost", cpu_cores=16)
    names = [f"i{n}" for n in range(6)]
    async with control_plane(storage, agents, change=two_at_once) as plane:
        async with add_node(plane, joining):
            for name in names:
                await plane.instances.create(draft(name, availability=RESCHEDULE), mutation())
        async with add_node(plane, registration("other", cpu_cores=16)) as other_id:
            gate = agent_of(agents, plane, other_id).gates["create"] = asyncio.Event()
            await until(lambda: len(agents.by_node[other_id].calls) == 2)
            await asyncio.sleep(0.5)
            assert len(agents.by_node[other_id].calls) == 2

            gate.set()
            await until(lambda: all(named(plane, n).status is InstanceStatus.RUNNING for n in names))

            await allocation_is_sum(storage)


async def test_many_lost_together_are_held_until_an_operator_says_that_they_are_dead(
    storage: Storage,
) -> None:
    agents = MemoryAgents()
    lost = [registration(f"lost-{n}", zone="a") for n in range(2)]
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(control_plane(storage, agents))
        await stack.enter_async_context(add_node(plane, registration("left", zone="a")))
        async with AsyncExitStack() as dying:
            for joining in lost:
                await dying.enter_async_context(add_node(plane, joining))
            for n, joining in enumerate(lost):
                await plane.instances.create(
                    draft(f"i{n}", availability=RESCHEDULE, node=joining.id), mutation()
                )
        await until(
            lambda: all(
                bool(n.value.loss and n.value.loss.held)
                for n in plane.view.nodes()
                if "lost" in n.value.hostname
            )
        )
        assert "2 of 3 nodes of zone a" in (plane.nodes.resolve("lost-0").value.loss or 0).held  # type: ignore[union-attr]
        await until(lambda: "looks like a partition" in named(plane, "i0").status_message)
        assert [named(plane, f"i{n}").epoch for n in range(2)] == [1, 1]


async def test_a_dead_node_is_evacuated_whatever_the_policies_and_deregistered(storage: Storage) -> None:
    agents = MemoryAgents()
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(control_plane(storage, agents))
        dead = registration("dead", fencing=None)
        async with add_node(plane, dead), add_node(plane, registration("also-lost", fencing=None)) as also_id:
            for name in ("runs", "stopped", "goes"):
                await plane.instances.create(draft(name, node=dead.id), mutation())
            await plane.instances.stop(InstanceRef("stopped"), mutation(), options=StopOptions(0.0))
            agent_of(agents, plane, dead.id).unreachable = True
        await stack.enter_async_context(add_node(plane, registration("other")))
        await until(lambda: plane.nodes.resolve("dead").value.status is NodeStatus.OFFLINE)
        await until(lambda: plane.nodes.resolve(also_id).value.status is NodeStatus.OFFLINE)
        await until(lambda: named(plane, "stopped").status is InstanceStatus.UNKNOWN)

        plan = plane.nodes.plan_evacuation("dead")
        assert {move.instance_name for move in plan} == {"runs", "stopped", "goes"}
        # All three are pinned to the dead node: they fit nowhere else, and say so.
        assert all("no node fits" in move.reason for move in plan)
        done = await plane.nodes.evacuate("dead", mutation(), resource_version=0)
        assert done.value.state is OperationState.SUCCEEDED
        await until(lambda: "no node fits" in (named(plane, "runs").lost or 0).waiting)  # type: ignore[union-attr]


async def test_evacuated_instances_keep_whether_they_run(storage: Storage) -> None:
    agents = MemoryAgents()
    dead = registration("dead", fencing=None)
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, dead):
            for name in ("runs", "stopped", "ended"):
                await plane.instances.create(draft(name), mutation())
            await plane.instances.stop(InstanceRef("stopped"), mutation(), options=StopOptions(0.0))
            agent = agents.by_node[dead.id]
            ended = agent.end(named(plane, "ended").id, exit_code=0)
            await plane.nodes.update_status(dead.id, dead.incarnation, drivers=None, observations=(ended,))
            agent.unreachable = True
        async with add_node(plane, registration("other")) as other_id:
            await until(
                lambda: all(
                    named(plane, n).status is InstanceStatus.UNKNOWN for n in ("runs", "stopped", "ended")
                )
            )

            await plane.nodes.evacuate("dead", mutation("r-1"), resource_version=0)
            await plane.nodes.evacuate("dead", mutation("r-1"), resource_version=0)
            await until(lambda: not list(plane.view.instances_on(dead.id)))
            await until(lambda: all(not i.value.operation_id for i in plane.view.instances()))

            assert named(plane, "runs").status is InstanceStatus.RUNNING
            assert named(plane, "stopped").status is InstanceStatus.STOPPED
            assert named(plane, "ended").status is InstanceStatus.STOPPED
            assert {named(plane, n).node_id for n in ("runs", "stopped", "ended")} == {other_id}
            await allocation_is_sum(storage)
            await plane.nodes.deregister("dead", mutation(), resource_version=0)
            assert [n.value.hostname for n in plane.view.nodes()] == ["other"]


async def test_an_instance_that_was_to_be_deleted_is_forgotten_with_its_dead_node(storage: Storage) -> None:
    agents = MemoryAgents()
    dead = registration("dead")
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, dead):
            await plane.instances.create(draft("web"), mutation())
            agents.by_node[dead.id].unreachable = True
            deleting = asyncio.create_task(
                plane.instances.delete(InstanceRef("web"), mutation(), options=StopOptions(0.0), force=True)
            )
            await until(lambda: named(plane).status is InstanceStatus.DELETING)
        with pytest.raises(Exception, match="cannot be reached"):
            await deleting

        await plane.nodes.evacuate("dead", mutation(), resource_version=0)
        await until(lambda: not list(plane.view.instances()))

        assert (await allocation_is_sum(storage))[dead.id].instances == 0


async def test_a_node_that_is_heard_of_is_not_evacuated(storage: Storage) -> None:
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, registration("here")):
        with pytest.raises(FailedPrecondition) as refused:
            await plane.nodes.evacuate("here", mutation(), resource_version=0)

        assert refused.value.reason == "NODE_READY"


async def test_fencing_that_is_switched_off_counts_as_off_until_the_agent_says_that_it_is_on(
    storage: Storage,
) -> None:
    joining = registration("node-1")
    async with control_plane(storage, MemoryAgents()) as plane:
        await plane.nodes.register(joining)

        async def beat(fencing: NodeFencing) -> bool:
            times = await plane.nodes.heartbeat(
                joining.id,
                joining.incarnation,
                joining.resources,
                {},
                usage=InstancesUsage(),
                fencing=fencing,
            )
            return times.disarmed

        def state() -> FencingState | None:
            found = plane.committer.find(keys.node(joining.id))  # newer than the view
            assert found is not None
            return found.value.fencing and found.value.fencing.state

        assert not await beat(ARMED)
        await plane.nodes.set_fencing(
            "node-1", mutation(), armed=False, reason="switch swap", resource_version=0
        )
        assert await beat(ARMED)  # it did not know yet
        assert state() is FencingState.DISARMED
        await plane.nodes.set_fencing("node-1", mutation(), armed=True, reason="", resource_version=0)
        assert state() is FencingState.DISARMED
        assert not await beat(NodeFencing(state=FencingState.DISARMED, reason="switched off"))
        assert state() is FencingState.DISARMED
        assert not await beat(ARMED)
        assert state() is FencingState.ARMED


async def test_a_replacement_that_cannot_be_made_is_tried_again_and_stays_recorded(storage: Storage) -> None:
    agents = MemoryAgents()
    async with (
        lost_with(storage, agents) as (plane, _),
        add_node(plane, registration("other")) as other_id,
    ):
        agent = agent_of(agents, plane, other_id)
        agent.failures["create"] = FailedPrecondition("the image is not here", reason="IMAGE_MISSING")
        await until(
            lambda: named(plane).epoch >= 3 and named(plane).status is InstanceStatus.RUNNING, timeout_s=15
        )

        failed = [o.value for o in plane.view.operations() if o.value.state is OperationState.FAILED]
        assert [o.verb for o in failed] == ["replace"]
        assert agent.holds() == {named(plane).id}
        await allocation_is_sum(storage)
