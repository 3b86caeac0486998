"""Instances that move to another node: what becomes of both copies, of the reservations, and of failures on the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from msgspec import structs

from hvtest_agent import MemoryAgent, MemoryAgents
from hvtest_control_plane import (
    add_node,
    allocation_is_sum,
    control_plane,
    draft,
    mutation,
    registration,
    until,
)
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import (
    Conflict,
    FailedPrecondition,
    HypervisorError,
    Internal,
    NotFound,
    ResourceExhausted,
)
from hypervisor.core.model import Instance, Node, Observation
from hypervisor.core.moves import MovePhase, MovePolicy, MoveStrategy
from hypervisor.core.states import InstanceStatus, InstanceType, NodeStatus, OperationState
from hypervisor.server.agents import Agent, CallContext
from hypervisor.server.control_plane import ControlPlane
from hypervisor.server.services import Caller, InstanceRef, MoveOrder, StopOptions
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import Storage

WEB = InstanceRef("web")
ANYWHERE = MoveOrder()
STOP = MoveOrder(strategy=MoveStrategy.STOP)
FORCE = StopOptions(grace_s=0.0)
ALICE = Caller("alice", "r")


@dataclass
class Cluster:
    """Two nodes, and ``web`` running on the first."""

    plane: ControlPlane
    agents: MemoryAgents
    storage: Storage
    old: str
    new: str

    def agent(self, node_id: str) -> MemoryAgent:
        return self.agents.by_node[node_id]

    @property
    def web(self) -> Instance:
        return self.plane.instances.resolve(WEB).value

    async def move(self, order: MoveOrder = ANYWHERE, *, wait: bool = True) -> str:
        """Returns the id of the operation."""
        moved = await self.plane.moves.move(WEB, mutation(wait=wait), order=order, grace_s=0.0)
        return moved.value.id

    async def reserved(self) -> dict[str, int]:
        """Instances counted on each node, in the store; each allocation is the sum it has to be."""
        held = await allocation_is_sum(self.storage)
        return {node: held[node].instances for node in (self.old, self.new)}


@asynccontextmanager
async def cluster(storage: Storage, **spec: object) -> AsyncIterator[Cluster]:
    agents = MemoryAgents()
    async with (
        control_plane(storage, agents) as plane,
        add_node(plane, registration("node-1")) as old,
        add_node(plane, registration("node-2")) as new,
    ):
        for node_id in (old, new):
            agents.agent(plane.nodes.resolve(node_id).value)
        await plane.nodes.cordon(new, mutation(), reason="", resource_version=0)
        await plane.instances.create(draft("web", **spec), mutation())
        await plane.nodes.uncordon(new, mutation(), resource_version=0)
        yield Cluster(plane, agents, storage, old, new)


@pytest.fixture
async def memory() -> AsyncIterator[Storage]:
    storage = MemoryStorage(SystemClock())
    yield storage
    await storage.aclose()


@pytest.mark.parametrize("order", [ANYWHERE, STOP], ids=["replace", "stop"])
async def test_a_running_container_moves_with_what_it_reserves(storage: Storage, order: MoveOrder) -> None:
    async with cluster(storage) as c:
        await c.move(order)

        assert (c.web.node_id, c.web.epoch, c.web.status) == (c.new, 2, InstanceStatus.RUNNING)
        assert (c.web.move, c.web.operation_id, c.web.home) == (None, "", "")
        assert (c.agent(c.old).holds(), c.agent(c.new).holds()) == (set(), {c.web.id})
        assert await c.reserved() == {c.old: 0, c.new: 1}


async def test_a_replacement_runs_before_the_old_copy_is_touched(memory: Storage) -> None:
    async with cluster(memory) as c:
        gate = c.agent(c.new).gates["create"] = asyncio.Event()
        moving = asyncio.create_task(c.move())
        await until(lambda: ("create", c.web.id) in c.agent(c.new).calls)

        assert c.web.status is InstanceStatus.MIGRATING
        assert (c.web.node_id, c.web.epoch) == (c.old, 1)
        assert c.web.move is not None
        assert (c.web.move.phase, c.web.move.target) == (MovePhase.STARTING, c.new)
        assert c.agent(c.old).held[c.web.id].status is InstanceStatus.RUNNING
        assert await c.reserved() == {c.old: 1, c.new: 1}

        gate.set()
        await moving
        verbs = [verb for verb, _ in c.agent(c.old).calls]
        assert "stop" not in verbs[verbs.index("create") + 1 :]
        assert verbs[-1] == "delete"


async def test_stop_and_move_never_has_two_copies(memory: Storage) -> None:
    async with cluster(memory) as c:
        gate = c.agent(c.new).gates["create"] = asyncio.Event()
        moving = asyncio.create_task(c.move(STOP))
        await until(lambda: ("create", c.web.id) in c.agent(c.new).calls)

        assert c.agent(c.old).held[c.web.id].status is InstanceStatus.STOPPED
        assert c.web.move is not None
        assert c.web.move.phase is MovePhase.MAKING

        gate.set()
        await moving


async def test_a_stopped_instance_moves_without_being_started(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.plane.instances.stop(WEB, mutation(), options=FORCE)
        await c.move()

        assert (c.web.node_id, c.web.status) == (c.new, InstanceStatus.STOPPED)
        assert c.agent(c.new).held[c.web.id].status is InstanceStatus.STOPPED
        assert await c.reserved() == {c.old: 0, c.new: 1}


@pytest.mark.parametrize("order", [ANYWHERE, STOP], ids=["replace", "stop"])
async def test_a_copy_that_cannot_be_made_leaves_the_instance_where_it_was(
    storage: Storage, order: MoveOrder
) -> None:
    async with cluster(storage) as c:
        c.agent(c.new).failures["create"] = NotFound("there is no such image", reason="IMAGE_NOT_FOUND")

        with pytest.raises(NotFound, match="no such image") as failed:
            await c.move(order)

        assert (c.web.node_id, c.web.epoch, c.web.status) == (c.old, 1, InstanceStatus.RUNNING)
        assert (c.web.move, c.web.operation_id) == (None, "")
        assert "no such image" in c.web.status_message
        assert (c.agent(c.old).holds(), c.agent(c.new).holds()) == ({c.web.id}, set())
        assert c.agent(c.old).held[c.web.id].status is InstanceStatus.RUNNING
        assert await c.reserved() == {c.old: 1, c.new: 0}
        operation = c.plane.operations.get(failed.value.metadata["operation_id"]).value
        assert operation.state is OperationState.FAILED

        await c.move(order)
        assert (c.web.node_id, c.web.epoch) == (c.new, 3), "an epoch that was given out is not used again"


async def test_a_copy_that_ends_at_once_does_not_take_over(memory: Storage) -> None:
    async with cluster(memory) as c:
        c.agent(c.new).exits_at_once = 1

        with pytest.raises(FailedPrecondition, match="exit code 1") as failed:
            await c.move()

        assert failed.value.reason == "MOVE_COPY_ENDED"
        assert (c.web.node_id, c.web.status) == (c.old, InstanceStatus.RUNNING)
        assert await c.reserved() == {c.old: 1, c.new: 0}


async def test_a_copy_takes_over_only_after_it_has_run_for_the_time_asked_for(memory: Storage) -> None:
    async with cluster(memory, move=MovePolicy(healthy_s=0.05)) as c:
        gate = c.agent(c.new).gates["list"] = asyncio.Event()
        moving = asyncio.create_task(c.move())
        await until(lambda: ("list", "") in c.agent(c.new).calls)
        assert c.web.node_id == c.old
        c.agent(c.new).end(c.web.id, exit_code=3)
        gate.set()

        with pytest.raises(FailedPrecondition, match="exit code 3"):
            await moving
        assert (c.web.node_id, c.web.status) == (c.old, InstanceStatus.RUNNING)

        await c.move()
        assert c.web.node_id == c.new


@pytest.mark.parametrize("order", [ANYWHERE, STOP], ids=["replace", "stop"])
async def test_a_cancelled_move_is_undone(memory: Storage, order: MoveOrder) -> None:
    async with cluster(memory) as c:
        c.agent(c.new).gates["create"] = asyncio.Event()
        operation_id = await c.move(order, wait=False)
        await until(lambda: ("create", c.web.id) in c.agent(c.new).calls)
        await c.plane.operations.cancel(operation_id, ALICE)
        ended = await c.plane.operations.wait(operation_id, timeout_s=10)

        assert ended.value.state is OperationState.CANCELLED
        await c.plane.view.wait_revision(ended.revision)
        assert (c.web.node_id, c.web.status, c.web.move) == (c.old, InstanceStatus.RUNNING, None)
        assert c.agent(c.new).holds() == set()
        assert await c.reserved() == {c.old: 1, c.new: 0}


async def test_an_old_node_that_does_not_answer_is_cleaned_up_when_it_does(memory: Storage) -> None:
    async with cluster(memory) as c:
        gate = c.agent(c.new).gates["create"] = asyncio.Event()
        operation_id = await c.move(wait=False)
        await until(lambda: ("create", c.web.id) in c.agent(c.new).calls)
        c.agent(c.old).unreachable = True
        gate.set()
        ended = await c.plane.operations.wait(operation_id, timeout_s=10)

        assert ended.value.state is OperationState.SUCCEEDED
        assert "as soon as its node answers" in ended.value.progress_message
        await c.plane.view.wait_revision(ended.revision)
        assert (c.web.node_id, c.web.status) == (c.new, InstanceStatus.RUNNING)
        assert c.web.move is not None
        assert await c.reserved() == {c.old: 1, c.new: 1}, "what may still be there is still reserved"
        with pytest.raises(Conflict) as refused:
            await c.move()
        assert refused.value.reason == "MOVE_UNFINISHED"

        c.agent(c.old).unreachable = False
        await until(lambda: c.web.move is None)
        assert c.agent(c.old).holds() == set()
        assert await c.reserved() == {c.old: 0, c.new: 1}


async def test_a_node_that_never_comes_back_is_given_up_with_what_a_move_left_there(memory: Storage) -> None:
    async with AsyncExitStack() as stack:
        agents = MemoryAgents()
        plane = await stack.enter_async_context(control_plane(memory, agents))
        dying = AsyncExitStack()
        old = await dying.enter_async_context(add_node(plane, registration("node-1")))
        await plane.instances.create(draft("web"), mutation())
        new = await stack.enter_async_context(add_node(plane, registration("node-2")))
        c = Cluster(plane, agents, memory, old, new)
        gate = agents.agent(plane.nodes.resolve(new).value).gates["create"] = asyncio.Event()
        operation_id = await c.move(wait=False)
        await until(lambda: ("create", c.web.id) in c.agent(new).calls)
        c.agent(old).unreachable = True
        gate.set()
        await plane.operations.wait(operation_id, timeout_s=10)
        with pytest.raises(FailedPrecondition) as alive:
            await plane.nodes.deregister("node-1", mutation(), resource_version=0)
        assert alive.value.reason == "NODE_READY"
        assert c.web.move is not None
        await dying.aclose()
        await until(lambda: plane.nodes.resolve(old).value.status is NodeStatus.OFFLINE)

        await plane.nodes.deregister("node-1", mutation(), resource_version=0)

        assert c.web.move is None
        assert (await allocation_is_sum(memory))[new].instances == 1


async def test_an_instance_with_an_old_copy_elsewhere_is_deleted_with_it(memory: Storage) -> None:
    async with cluster(memory) as c:
        gate = c.agent(c.new).gates["create"] = asyncio.Event()
        operation_id = await c.move(wait=False)
        await until(lambda: ("create", c.web.id) in c.agent(c.new).calls)
        c.agent(c.old).unreachable = True
        gate.set()
        await c.plane.operations.wait(operation_id, timeout_s=10)
        await until(lambda: not c.web.operation_id)

        with pytest.raises(HypervisorError):
            await c.plane.instances.delete(WEB, mutation(), options=FORCE, force=True)
        assert await c.reserved() == {c.old: 1, c.new: 1}

        c.agent(c.old).unreachable = False
        await until(lambda: not list(c.plane.view.instances()))
        assert (c.agent(c.old).holds(), c.agent(c.new).holds()) == (set(), set())
        assert await c.reserved() == {c.old: 0, c.new: 0}


async def test_a_target_that_is_lost_on_the_way_leaves_the_instance_where_it_was(memory: Storage) -> None:
    async with AsyncExitStack() as stack:
        agents = MemoryAgents()
        plane = await stack.enter_async_context(control_plane(memory, agents))
        old = await stack.enter_async_context(add_node(plane, registration("node-1")))
        await plane.instances.create(draft("web"), mutation())
        lost = AsyncExitStack()
        new = await lost.enter_async_context(add_node(plane, registration("node-2")))
        agent = agents.agent(plane.nodes.resolve(new).value)
        agent.gates["create"] = asyncio.Event()
        c = Cluster(plane, agents, memory, old, new)
        operation_id = await c.move(wait=False)
        await until(lambda: ("create", c.web.id) in agent.calls)
        agent.unreachable = True
        agent.gates.pop("create").set()
        await lost.aclose()

        ended = await plane.operations.wait(operation_id, timeout_s=15)
        assert ended.value.state is OperationState.FAILED
        await plane.view.wait_revision(ended.revision)
        assert plane.nodes.resolve(new).value.status is NodeStatus.OFFLINE
        assert (c.web.node_id, c.web.status, c.web.epoch) == (old, InstanceStatus.RUNNING, 1)
        assert await c.reserved() == {old: 1, new: 1}, "a copy may be there"


@pytest.mark.parametrize(
    ("order", "node", "verb"),
    [
        (ANYWHERE, "new", "create"),
        (ANYWHERE, "old", "delete"),
        (STOP, "old", "stop"),
        (STOP, "new", "create"),
        (STOP, "old", "delete"),
    ],
)
async def test_another_server_finishes_the_move_of_one_that_died(
    memory: Storage, order: MoveOrder, node: str, verb: str
) -> None:
    agents = MemoryAgents()
    async with (
        control_plane(memory, agents, server_id="s-2") as two,
        add_node(two, registration("node-1")) as old,
    ):
        await two.instances.create(draft("web"), mutation())
        async with add_node(two, registration("node-2")) as new:
            c = Cluster(two, agents, memory, old, new)
            for node_id in (old, new):
                agents.agent(two.nodes.resolve(node_id).value)
            agent = c.agent(old if node == "old" else new)
            gate = agent.gates[verb] = asyncio.Event()
            async with control_plane(memory, agents, server_id="s-1") as one:
                moved = await one.moves.move(WEB, mutation(wait=False), order=order, grace_s=0.0)
                await until(lambda: (verb, c.web.id) in agent.calls)
            gate.set()

            ended = await two.operations.wait(moved.value.id, timeout_s=15)
            assert ended.value.state is OperationState.SUCCEEDED
            await two.view.wait_revision(ended.revision)
            assert (c.web.node_id, c.web.epoch, c.web.status) == (new, 2, InstanceStatus.RUNNING)
            assert (c.agent(old).holds(), c.agent(new).holds()) == (set(), {c.web.id})
            assert await c.reserved() == {old: 0, new: 1}


async def test_what_cannot_be_moved_is_refused_with_the_reason(memory: Storage) -> None:
    async with cluster(memory) as c:
        with pytest.raises(FailedPrecondition) as there:
            await c.move(MoveOrder(node="node-1"))
        assert there.value.reason == "ALREADY_THERE"
        with pytest.raises(NotFound) as unknown:
            await c.move(MoveOrder(node="node-9"))
        assert unknown.value.reason == "NODE_NOT_FOUND"
        with pytest.raises(FailedPrecondition, match="use replace") as live:
            await c.move(MoveOrder(strategy=MoveStrategy.LIVE))
        assert live.value.reason == "LIVE_MOVE_UNAVAILABLE"
        await c.plane.nodes.cordon(c.new, mutation(), reason="", resource_version=0)
        with pytest.raises(ResourceExhausted, match="node-2") as full:
            await c.move()
        assert full.value.reason == "NO_NODE_FITS"
        assert c.web.status is InstanceStatus.RUNNING
        assert await c.reserved() == {c.old: 1, c.new: 0}


async def test_a_pinned_instance_stays(memory: Storage) -> None:
    async with cluster(memory, node="node-1") as c:
        with pytest.raises(FailedPrecondition, match=r"spec\.node") as refused:
            await c.move()
        assert refused.value.reason == "PINNED"


async def test_the_local_disk_of_a_machine_is_given_up_only_where_that_is_allowed(memory: Storage) -> None:
    async with cluster(memory) as c:
        plain = draft("vm-1", disk_gb=2)
        spec = structs.replace(plain.spec, image="/srv/vm-1.raw")
        machine = replace(plain, type=InstanceType.VM, spec=spec)
        await c.plane.instances.create(machine, mutation())
        ref = InstanceRef("vm-1")

        with pytest.raises(FailedPrecondition, match="disk of 2 GiB") as refused:
            await c.plane.moves.move(ref, mutation(), order=ANYWHERE, grace_s=0.0)
        assert refused.value.reason == "MOVE_LOSES_DISK"

        order = MoveOrder(allow_disk_loss=True)
        operation = await c.plane.moves.move(ref, mutation(), order=order, grace_s=0.0)
        assert operation.value.state is OperationState.SUCCEEDED
        assert c.plane.instances.resolve(ref).value.epoch == 2


async def test_a_repeated_request_moves_once(memory: Storage) -> None:
    async with cluster(memory) as c:
        first = await c.plane.moves.move(WEB, mutation("r-1"), order=ANYWHERE, grace_s=0.0)
        again = await c.plane.moves.move(WEB, mutation("r-1"), order=ANYWHERE, grace_s=0.0)

        assert first.value.id == again.value.id
        assert (c.web.node_id, c.web.epoch) == (c.new, 2)


async def test_an_instance_goes_back_to_where_it_was(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.move()
        await c.move(MoveOrder(node="node-1"))

        assert (c.web.node_id, c.web.epoch) == (c.old, 3)
        assert c.agent(c.old).holds() == {c.web.id}
        assert await c.reserved() == {c.old: 1, c.new: 0}


async def test_a_source_that_cannot_be_stopped_keeps_the_instance(memory: Storage) -> None:
    async with cluster(memory) as c:
        c.agent(c.old).failures["stop"] = Internal("the runtime hangs")
        with pytest.raises(HypervisorError):
            await c.move(STOP)

        assert (c.web.node_id, c.web.status) == (c.old, InstanceStatus.RUNNING)
        assert ("create", c.web.id) not in c.agent(c.new).calls
        assert await c.reserved() == {c.old: 1, c.new: 0}


async def test_what_agents_tell_of_both_copies_does_not_disturb_a_move(memory: Storage) -> None:
    async with cluster(memory) as c:
        gate = c.agent(c.new).gates["list"] = asyncio.Event()
        order = MoveOrder(healthy_s=0.02)
        moving = asyncio.create_task(c.move(order))
        await until(lambda: ("list", "") in c.agent(c.new).calls)
        node = c.plane.nodes.resolve(c.new).value
        copy = c.agent(c.new).observe(c.web.id)
        unexpected = await c.plane.nodes.update_status(
            c.new, node.incarnation, drivers=None, observations=(copy,)
        )
        assert unexpected == ()
        own = c.agent(c.old).observe(c.web.id)
        node = c.plane.nodes.resolve(c.old).value
        await c.plane.nodes.update_status(c.old, node.incarnation, drivers=None, observations=(own,))
        assert (c.web.status, c.web.node_id) == (InstanceStatus.MIGRATING, c.old)

        gate.set()
        await moving
        assert (c.web.status, c.web.node_id) == (InstanceStatus.RUNNING, c.new)


async def test_a_copy_of_a_failed_move_that_turns_up_later_is_not_taken_for_the_instance(
    memory: Storage,
) -> None:
    async with cluster(memory) as c:
        c.agent(c.new).failures["create"] = NotFound("there is no such image", reason="IMAGE_NOT_FOUND")
        with pytest.raises(NotFound):
            await c.move()
        copy = structs.replace(c.web, node_id=c.new, epoch=2)
        late = await c.agent(c.new).create(copy, CallContext("late", 1.0), start=True)

        node = c.plane.nodes.resolve(c.new).value
        unexpected = await c.plane.nodes.update_status(
            c.new, node.incarnation, drivers=None, observations=(late,)
        )

        assert unexpected == (c.web.id,)
        assert (c.web.node_id, c.web.epoch) == (c.old, 1)
        assert await c.reserved() == {c.old: 1, c.new: 0}


class MemoryMoves:
    """Takes instances of agents in memory along. ``fails``: once, after it has begun on the target."""

    def __init__(self) -> None:
        self.fails = False
        self.moved: list[str] = []

    def why_not(self, instance: Instance, source: Node | None) -> str:
        return "" if instance.type is InstanceType.VM else "only machines can"

    async def move(
        self, instance: Instance, copy: Instance, source: Agent, target: Agent, context: CallContext
    ) -> Observation:
        seen = await target.create(copy, context, start=True)
        if self.fails:
            self.fails = False
            raise Internal("the connection between the nodes broke")
        await source.delete(instance, context, grace_s=0.0)
        self.moved.append(instance.id)
        return seen


async def test_a_machine_is_taken_along_live_where_that_can_be_done_or_goes_on_where_it_was(
    memory: Storage,
) -> None:
    agents, live = MemoryAgents(), MemoryMoves()
    async with (
        control_plane(memory, agents, live=live) as plane,
        add_node(plane, registration("node-1")) as old,
    ):
        plain = draft("web", disk_gb=2)
        spec = structs.replace(plain.spec, image="/srv/web.raw")
        await plane.instances.create(replace(plain, type=InstanceType.VM, spec=spec), mutation())
        async with add_node(plane, registration("node-2")) as new:
            c = Cluster(plane, agents, memory, old, new)
            live.fails = True
            with pytest.raises(HypervisorError):
                await c.move()
            assert (c.web.node_id, c.web.epoch, c.web.status) == (old, 1, InstanceStatus.RUNNING)
            assert c.agent(new).holds() == set()

            await c.move()

            assert live.moved == [c.web.id]
            assert (c.web.node_id, c.web.epoch, c.web.status) == (new, 3, InstanceStatus.RUNNING)
            assert (c.agent(old).holds(), c.agent(new).holds()) == (set(), {c.web.id})
            assert await c.reserved() == {old: 0, new: 1}
