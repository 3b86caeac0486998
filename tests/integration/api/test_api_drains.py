"""Moves, drains and budgets through the API, with whole agents and the fake driver."""

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of, whole_agent
from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument, NotFound
from hypervisor.v1 import cluster_pb2, compute_pb2, instance_pb2, maintenance_pb2, maintenance_pb2_grpc


@pytest.fixture
async def other(server: WholeServer, tmp_path: Path) -> AsyncIterator[WholeAgent]:
    async with whole_agent(server, tmp_path, hostname="node-2") as running:
        yield running


@pytest.fixture
def maintenance(server: WholeServer) -> "maintenance_pb2_grpc.MaintenanceServiceAsyncStub":
    stub: maintenance_pb2_grpc.MaintenanceServiceAsyncStub = maintenance_pb2_grpc.MaintenanceServiceStub(
        server.channel
    )
    return stub


async def refused(call: Awaitable[Any]) -> HypervisorError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failure_of(failed.value)


async def steps_of(stream: Any) -> list[cluster_pb2.DrainNodeProgress]:
    return [step async for step in stream]


async def pinned_to_first(server: WholeServer, *names: str) -> None:
    """Instances on node-1."""
    await server.cluster.CordonNode(cluster_pb2.CordonNodeRequest(node="node-2"))
    for name in names:
        request = container(name)
        request.instance.labels["app"] = "web"
        await server.compute.CreateInstance(request)
    await server.cluster.UncordonNode(cluster_pb2.UncordonNodeRequest(node="node-2"))


async def test_an_instance_is_moved_and_tells_so(
    server: WholeServer, agent: WholeAgent, other: WholeAgent
) -> None:
    await pinned_to_first(server, "web")
    operation = await server.compute.MoveInstance(
        compute_pb2.MoveInstanceRequest(instance="web", node="node-2")
    )

    assert (operation.verb, operation.done) == ("move", True)
    assert operation.instance.node_id == other.node_id
    assert operation.instance.epoch == 2
    assert operation.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING
    assert not operation.instance.HasField("move")
    error = await refused(
        server.compute.MoveInstance(compute_pb2.MoveInstanceRequest(instance="web", node="node-2"))
    )
    assert (type(error), error.reason) == (FailedPrecondition, "ALREADY_THERE")


async def test_every_wrong_field_of_a_move_is_told(server: WholeServer, agent: WholeAgent) -> None:
    request = compute_pb2.MoveInstanceRequest(instance="", node="n" * 300, strategy=9)  # type: ignore[arg-type]
    request.healthy_after.seconds = 7200
    error = await refused(server.compute.MoveInstance(request))

    assert isinstance(error, InvalidArgument)
    assert {v.field for v in error.violations} == {"instance", "node", "strategy", "healthy_after"}


async def test_a_spec_says_how_it_is_moved(server: WholeServer, agent: WholeAgent) -> None:
    request = container("web")
    request.instance.spec.move.strategy = instance_pb2.MOVE_STRATEGY_STOP
    request.instance.spec.move.healthy_after.seconds = 3
    made = await server.compute.CreateInstance(request)
    assert made.instance.spec.move == request.instance.spec.move

    request = container("bad")
    request.instance.spec.move.healthy_after.seconds = -1
    error = await refused(server.compute.CreateInstance(request))
    assert [v.field for v in error.violations] == ["instance.spec.move.healthy_after"]


async def test_a_node_is_drained_watched_and_given_back_its_instances(
    server: WholeServer,
    agent: WholeAgent,
    other: WholeAgent,
    maintenance: "maintenance_pb2_grpc.MaintenanceServiceAsyncStub",
) -> None:
    await pinned_to_first(server, "a", "b")
    request = cluster_pb2.DrainNodeRequest(node="node-1", dry_run=True)
    (plan,) = await steps_of(server.cluster.DrainNode(request))
    assert [(i.name, i.state, i.target_node_id) for i in plan.instances] == [
        ("a", cluster_pb2.DrainInstance.STATE_PLANNED, other.node_id),
        ("b", cluster_pb2.DrainInstance.STATE_PLANNED, other.node_id),
    ]

    steps = await steps_of(server.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node="node-1")))
    assert (steps[0].instances_total, steps[-1].done, steps[-1].instances_moved) == (2, True, 2)
    (again,) = await steps_of(maintenance.WatchDrain(maintenance_pb2.WatchDrainRequest(node="node-1")))
    assert again.done
    listed = await server.compute.ListInstances(compute_pb2.ListInstancesRequest())
    assert {i.node_id for i in listed.instances} == {other.node_id}
    assert {i.home_node_id for i in listed.instances} == {agent.node_id}
    node = await server.cluster.GetNode(cluster_pb2.GetNodeRequest(node="node-1"))
    assert (node.drain.kind, node.drain.active, node.drain.instances_total) == ("drain", False, 2)

    home = maintenance_pb2.RestoreNodeRequest(node="node-1")
    steps = await steps_of(maintenance.RestoreNode(home))
    assert steps[-1].message == "everything is home"
    listed = await server.compute.ListInstances(compute_pb2.ListInstancesRequest())
    assert {i.node_id for i in listed.instances} == {agent.node_id}


async def test_budgets_through_the_api(
    server: WholeServer,
    agent: WholeAgent,
    other: WholeAgent,
    maintenance: "maintenance_pb2_grpc.MaintenanceServiceAsyncStub",
) -> None:
    await pinned_to_first(server, "a", "b")
    selector = [instance_pb2.LabelConstraint(key="app", values=["web"])]
    wanted = maintenance_pb2.DisruptionBudget(name="web", selector=selector, min_available=1)
    made = await maintenance.SetBudget(maintenance_pb2.SetBudgetRequest(budget=wanted))
    assert (made.project, made.members, made.available, made.allowed) == ("default", 2, 2, 1)
    listed = await maintenance.ListBudgets(maintenance_pb2.ListBudgetsRequest())
    assert [b.name for b in listed.budgets] == ["web"]
    await maintenance.DeleteBudget(maintenance_pb2.DeleteBudgetRequest(name="web"))
    gone = await refused(maintenance.DeleteBudget(maintenance_pb2.DeleteBudgetRequest(name="web")))
    assert (type(gone), gone.reason) == (NotFound, "BUDGET_NOT_FOUND")
    bad = maintenance_pb2.DisruptionBudget(name="Bad Name")
    error = await refused(maintenance.SetBudget(maintenance_pb2.SetBudgetRequest(budget=bad)))
    assert {v.field for v in error.violations} == {"budget.name", "budget.selector", "budget"}


async def test_every_wrong_field_of_a_drain_is_told(
    server: WholeServer,
    agent: WholeAgent,
    maintenance: "maintenance_pb2_grpc.MaintenanceServiceAsyncStub",
) -> None:
    request = cluster_pb2.DrainNodeRequest(node="", parallel=65, reason="r" * 257)
    request.deadline.seconds = 1
    request.strategies["disk"] = instance_pb2.MOVE_STRATEGY_STOP
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await steps_of(server.cluster.DrainNode(request))
    error = failure_of(failed.value)
    assert {v.field for v in error.violations} == {"node", "parallel", "reason", "deadline", "strategies"}
    error = await refused(maintenance.CancelDrain(maintenance_pb2.CancelDrainRequest(node="node-1")))
    assert error.reason == "NOT_DRAINING"
