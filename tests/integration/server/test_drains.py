"""Nodes that are emptied: through the whole control plane, with servers that die, budgets, force and the way home."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

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
from hypervisor.core.errors import Cancelled, FailedPrecondition, HypervisorError, Unavailable
from hypervisor.core.model import Instance, LabelConstraint
from hypervisor.core.moves import MoveState, MoveStrategy
from hypervisor.core.states import InstanceStatus, InstanceType, NodeStatus, OperationState
from hypervisor.server.control_plane import ControlPlane
from hypervisor.server.draining.progress import DrainProgress
from hypervisor.server.draining.records import Budget, DrainKind, DrainOrder
from hypervisor.server.services import Caller, InstanceRef, StopOptions
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import Storage
from hypervisor.server.verbs import LED

FORCE = StopOptions(grace_s=0.0)
ALICE = Caller("alice", "r")
GENTLE = DrainOrder(timeout_s=20.0, grace_s=0.0)
BY_STOP = DrainOrder(timeout_s=20.0, grace_s=0.0, strategies={InstanceType.CONTAINER: MoveStrategy.STOP})


@dataclass
class Cluster:
    """``node-1`` has all the instances, the others are empty."""

    plane: ControlPlane
    agents: MemoryAgents
    storage: Storage
    nodes: dict[str, str] = field(default_factory=dict)

    def agent(self, hostname: str) -> MemoryAgent:
        return self.agents.agent(self.plane.nodes.resolve(hostname).value)

    def on(self, hostname: str) -> set[str]:
        """Names of the instances placed on the node."""
        return {i.value.name for i in self.plane.view.instances_on(self.nodes[hostname])}

    def instance(self, name: str) -> Instance:
        return self.plane.instances.resolve(InstanceRef(name)).value

    async def fill(self, *names: str, labels: Mapping[str, str] | None = None) -> None:
        """Instances on node-1."""
        for name in names:
            spec = draft(name, cpu_cores=0.1)
            order = replace(spec, labels=labels or {})
            for other in self.nodes:
                if other != "node-1":
                    await self.plane.nodes.cordon(other, mutation(), reason="", resource_version=0)
            await self.plane.instances.create(order, mutation())
            for other in self.nodes:
                await self.plane.nodes.uncordon(other, mutation(), resource_version=0)

    async def begin(self, order: DrainOrder = GENTLE, request_id: str = "") -> str:
        return await self.plane.maintenance.drain(
            "node-1", mutation(request_id), order=order, reason="", resource_version=0
        )

    async def drain(self, order: DrainOrder = GENTLE) -> list[DrainProgress]:
        """All its steps."""
        return await watched(self.plane, await self.begin(order))


async def watched(plane: ControlPlane, operation_id: str = "") -> list[DrainProgress]:
    async with asyncio.timeout(30):
        return [step async for step in plane.maintenance.watch("node-1", operation_id)]


@asynccontextmanager
async def cluster(storage: Storage, *hostnames: str) -> AsyncIterator[Cluster]:
    agents = MemoryAgents()
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(control_plane(storage, agents))
        made = Cluster(plane, agents, storage)
        for hostname in hostnames or ("node-1", "node-2"):
            made.nodes[hostname] = await stack.enter_async_context(add_node(plane, registration(hostname)))
            made.agent(hostname)
        yield made


@pytest.fixture
async def memory() -> AsyncIterator[Storage]:
    storage = MemoryStorage(SystemClock())
    yield storage
    await storage.aclose()


def budget(**limit: int) -> Budget:
    return Budget(
        project="default",
        name="web",
        selector=(LabelConstraint(key="app", values=("web",)),),
        created_at=SystemClock().now(),
        **limit,
    )


async def test_a_drained_node_is_empty_and_takes_nothing_new(storage: Storage) -> None:
    async with cluster(storage) as c:
        await c.fill("a", "b", "c")
        await c.plane.instances.stop(InstanceRef("c"), mutation(), options=FORCE)
        steps = await c.drain()

        assert (steps[0].total, steps[-1].total) == (3, 3)
        assert (steps[-1].state, steps[-1].moved) == (OperationState.SUCCEEDED, 3)
        assert (c.on("node-1"), c.on("node-2")) == (set(), {"a", "b", "c"})
        assert c.agent("node-1").holds() == set()
        assert [c.instance(n).status.value for n in "abc"] == ["running", "running", "stopped"]
        assert {c.instance(n).home for n in "abc"} == {c.nodes["node-1"]}
        node = c.plane.nodes.resolve("node-1").value
        assert (node.schedulable, node.status) == (False, NodeStatus.MAINTENANCE)
        operation = c.plane.operations.get(steps[-1].operation_id).value
        assert (operation.verb, operation.state) == ("drain", OperationState.SUCCEEDED)
        held = await allocation_is_sum(storage)
        assert held[c.nodes["node-1"]].instances == 0


async def test_instances_are_brought_home(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a", "b")
        await c.drain()
        operation_id = await c.plane.maintenance.restore("node-1", mutation(), order=GENTLE)
        steps = await watched(c.plane, operation_id)

        assert steps[-1].state is OperationState.SUCCEEDED
        assert (c.on("node-1"), c.on("node-2")) == ({"a", "b"}, set())
        assert {c.instance(n).home for n in "ab"} == {""}
        assert c.plane.nodes.resolve("node-1").value.schedulable
        await allocation_is_sum(memory)


async def test_a_single_copy_is_replaced_before_it_is_stopped(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("web", labels={"app": "web"})
        await c.plane.maintenance.set_budget(budget(min_available=1))
        gate = c.agent("node-2").gates["create"] = asyncio.Event()
        draining = asyncio.create_task(c.drain())
        web = c.instance("web").id
        await until(lambda: ("create", web) in c.agent("node-2").calls)
        assert c.agent("node-1").held[web].status is InstanceStatus.RUNNING
        gate.set()

        steps = await draining
        assert steps[-1].state is OperationState.SUCCEEDED
        assert c.agent("node-2").held[web].status is InstanceStatus.RUNNING
        assert "stop" not in [verb for verb, _ in c.agent("node-1").calls]


async def test_a_budget_holds_back_what_would_be_away(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("w1", "w2", "w3", labels={"app": "web"})
        await c.plane.maintenance.set_budget(budget(max_unavailable=1))
        fewest = 3

        def look(_: object) -> None:
            nonlocal fewest
            fewest = min(
                fewest, sum(c.instance(n).status is InstanceStatus.RUNNING for n in ("w1", "w2", "w3"))
            )

        c.plane.view.add_listener(look)
        steps = await c.drain(replace_parallel(BY_STOP, 3))

        assert fewest == 2
        assert steps[-1].state is OperationState.SUCCEEDED
        assert c.on("node-2") == {"w1", "w2", "w3"}
        waits = {one.message for step in steps for one in step.instances if one.state is MoveState.WAITING}
        assert "budget web lets no more go: 2 of 3 run, at most 1 may be away" in waits


def replace_parallel(order: DrainOrder, parallel: int) -> DrainOrder:
    return structs.replace(order, parallel=parallel)


async def test_no_more_move_at_once_than_is_asked_for(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a", "b", "c", "d", "e")
        most = 0

        def look(_: object) -> None:
            nonlocal most
            now = sum(i.value.status is InstanceStatus.MIGRATING for i in c.plane.view.instances())
            most = max(most, now)

        c.plane.view.add_listener(look)
        await c.drain(replace_parallel(GENTLE, 2))

        assert most == 2
        assert c.on("node-1") == set()


async def test_the_next_leader_goes_on_with_a_drain(memory: Storage) -> None:
    agents = MemoryAgents()
    async with AsyncExitStack() as stack:
        dying = AsyncExitStack()
        one = await dying.enter_async_context(control_plane(memory, agents, server_id="s-1"))
        await until(lambda: one.reconciler.leading)
        two = await stack.enter_async_context(control_plane(memory, agents, server_id="s-2"))
        c = Cluster(two, agents, memory)
        for hostname in ("node-1", "node-2"):
            c.nodes[hostname] = await stack.enter_async_context(add_node(two, registration(hostname)))
            c.agent(hostname)
        await c.fill("a", "b", "c", "d")
        gate = c.agent("node-2").gates["create"] = asyncio.Event()
        await one.view.wait_revision(two.view.revision)
        operation_id = await one.maintenance.drain(
            "node-1", mutation(), order=GENTLE, reason="", resource_version=0
        )
        await until(lambda: any(verb == "create" for verb, _ in c.agent("node-2").calls))
        await dying.aclose()
        gate.set()

        steps = await watched(two, operation_id)
        assert (steps[-1].state, steps[-1].moved) == (OperationState.SUCCEEDED, 4)
        assert (c.on("node-1"), c.on("node-2")) == (set(), {"a", "b", "c", "d"})
        assert all(c.instance(n).status is InstanceStatus.RUNNING for n in "abcd")
        held = await allocation_is_sum(memory)
        assert held[c.nodes["node-1"]].instances == 0


async def test_a_cancelled_drain_begins_nothing_more(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a", "b", "c")
        gate = c.agent("node-2").gates["create"] = asyncio.Event()
        operation_id = await c.begin(replace_parallel(GENTLE, 1))
        await until(lambda: any(verb == "create" for verb, _ in c.agent("node-2").calls))
        await c.plane.maintenance.cancel("node-1", ALICE)
        with pytest.raises(Cancelled, match="stays cordoned"):
            await watched(c.plane, operation_id)
        gate.set()
        await until(lambda: not any(i.value.operation_id for i in c.plane.view.instances()))

        assert len(c.on("node-1")) == 2
        assert c.plane.operations.get(operation_id).value.state is OperationState.CANCELLED
        assert not c.plane.nodes.resolve("node-1").value.schedulable
        with pytest.raises(FailedPrecondition, match="not being drained"):
            await c.plane.maintenance.cancel("node-1", ALICE)


async def test_a_drain_without_room_ends_with_the_reason(memory: Storage) -> None:
    async with cluster(memory, "node-1") as c:
        await c.fill("a")
        order = DrainOrder(timeout_s=1.0, grace_s=0.0)
        with pytest.raises(
            FailedPrecondition, match=r"1 instances \(a\) could not be moved in 1 s: no node"
        ) as end:
            await c.drain(order)

        assert end.value.reason == "DRAIN_INCOMPLETE"
        assert c.instance("a").status is InstanceStatus.RUNNING


async def test_a_drain_of_what_can_never_go_ends_at_once(memory: Storage) -> None:
    async with cluster(memory) as c:
        pinned = draft("a", node="node-1")
        await c.plane.instances.create(pinned, mutation())
        with pytest.raises(FailedPrecondition, match="pinned to node node-1"):
            await c.drain(DrainOrder(timeout_s=3600.0))


async def test_a_move_that_fails_is_tried_again(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a")
        c.agent("node-2").failures["create"] = Unavailable("the driver restarts", reason="DRIVER_UNAVAILABLE")
        steps = await c.drain()

        assert steps[-1].state is OperationState.SUCCEEDED
        assert c.on("node-2") == {"a"}
        messages = [one.message for step in steps for one in step.instances]
        assert any("the driver restarts (tried 1 times" in message for message in messages)


async def test_past_the_deadline_what_is_left_is_stopped_by_force(memory: Storage) -> None:
    async with cluster(memory, "node-1") as c:
        await c.fill("a", "b")
        steps = await c.drain(DrainOrder(timeout_s=30.0, force_after_s=0.5))

        assert steps[-1].state is OperationState.SUCCEEDED
        assert steps[-1].stopped == 2
        assert "stopped by force" in steps[-1].message
        assert [c.instance(n).status.value for n in "ab"] == ["stopped", "stopped"]
        assert c.on("node-1") == {"a", "b"}


async def test_a_plan_says_what_would_go_where_and_records_nothing(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a")
        await c.plane.instances.create(draft("pin", node="node-1"), mutation())
        big = replace(draft("vm-1", node="", disk_gb=2), type=InstanceType.VM)
        big = replace(big, spec=structs.replace(big.spec, image="/srv/vm.raw"))
        await c.plane.nodes.cordon("node-2", mutation(), reason="", resource_version=0)
        await c.plane.instances.create(big, mutation())
        await c.plane.nodes.uncordon("node-2", mutation(), resource_version=0)
        revision = c.plane.view.revision

        plan = c.plane.maintenance.plan("node-1", order=GENTLE)

        by_name = {one.name: one for one in plan.instances}
        assert by_name["a"].state is MoveState.PLANNED
        assert (by_name["a"].strategy, by_name["a"].target) == (MoveStrategy.REPLACE, c.nodes["node-2"])
        assert by_name["pin"].state is MoveState.STUCK
        assert by_name["vm-1"].state is MoveState.STUCK
        assert "disk of 2 GiB" in by_name["vm-1"].message
        assert plan.message == "1 would go, 2 could not go now"
        assert c.plane.view.revision == revision
        assert c.plane.maintenance.state("node-1") is None
        again = c.plane.maintenance.plan("node-1", order=DrainOrder(allow_disk_loss=True))
        assert next(one for one in again.instances if one.name == "vm-1").state is MoveState.PLANNED


async def test_a_repeat_of_a_drain_goes_on_with_it_and_another_is_refused(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a")
        gate = c.agent("node-2").gates["create"] = asyncio.Event()
        first = await c.begin(request_id="r-1")
        assert await c.begin(request_id="r-1") == first
        with pytest.raises(FailedPrecondition, match="--cancel") as refused:
            await c.begin(request_id="r-2")
        assert refused.value.reason == "DRAINING"
        with pytest.raises(FailedPrecondition) as uncordoned:
            await c.plane.nodes.uncordon("node-1", mutation(), resource_version=0)
        assert uncordoned.value.reason == "DRAINING"
        gate.set()
        assert (await watched(c.plane, first))[-1].state is OperationState.SUCCEEDED
        assert await c.begin(request_id="r-1") == first
        assert (await watched(c.plane, first))[-1].state is OperationState.SUCCEEDED


async def test_several_watch_one_drain(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("a", "b")
        operation_id = await c.begin()
        one, other = await asyncio.gather(watched(c.plane, operation_id), watched(c.plane))

        assert one[-1].state is other[-1].state is OperationState.SUCCEEDED
        left = {(i.name, i.state) for step in one for i in step.instances}
        assert {("a", MoveState.MOVED), ("b", MoveState.MOVED)} <= left


async def test_a_node_that_is_offline_is_not_drained(memory: Storage) -> None:
    async with cluster(memory, "node-2") as c:
        async with add_node(c.plane, registration("node-1")) as node_id:
            c.nodes["node-1"] = node_id
        await until(lambda: c.plane.nodes.resolve("node-1").value.status is NodeStatus.OFFLINE)
        with pytest.raises(Unavailable, match="offline"):
            await c.begin()


async def test_two_drains_at_once_keep_to_one_budget(memory: Storage) -> None:
    async with cluster(memory, "node-1", "node-2", "node-3") as c:
        await c.fill("w1", labels={"app": "web"})
        for other in ("node-1", "node-3"):
            await c.plane.nodes.cordon(other, mutation(), reason="", resource_version=0)
        await c.plane.instances.create(replace(draft("w2"), labels={"app": "web"}), mutation())
        for other in ("node-1", "node-3"):
            await c.plane.nodes.uncordon(other, mutation(), resource_version=0)
        await c.plane.maintenance.set_budget(budget(max_unavailable=1))
        fewest = 2

        def look(_: object) -> None:
            nonlocal fewest
            up = sum(i.value.status is InstanceStatus.RUNNING for i in c.plane.view.instances())
            fewest = min(fewest, up)

        c.plane.view.add_listener(look)
        ids = [
            await c.plane.maintenance.drain(node, mutation(), order=BY_STOP, reason="", resource_version=0)
            for node in ("node-1", "node-2")
        ]
        for operation_id in ids:
            ended = await c.plane.operations.wait(operation_id, timeout_s=20)
            assert ended.value.state is OperationState.SUCCEEDED
        assert fewest == 1
        await until(lambda: c.on("node-3") == {"w1", "w2"})


async def test_budgets_are_listed_with_how_they_stand(memory: Storage) -> None:
    async with cluster(memory) as c:
        await c.fill("w1", "w2", labels={"app": "web"})
        await c.fill("other")
        await c.plane.maintenance.set_budget(budget(min_available=1))
        ((found, stands),) = c.plane.maintenance.budgets("default")
        assert (found.name, stands.members, stands.available, stands.allowed) == ("web", 2, 2, 1)
        await c.plane.maintenance.delete_budget("default", "web")
        assert c.plane.maintenance.budgets("") == []
        with pytest.raises(HypervisorError) as gone:
            await c.plane.maintenance.delete_budget("default", "web")
        assert gone.value.reason == "BUDGET_NOT_FOUND"


def test_kinds_of_drains_are_verbs_of_operations() -> None:
    assert {kind.value for kind in DrainKind} == LED
