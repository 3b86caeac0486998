"""Instances through the whole control plane, with real stores and agents in memory."""

import asyncio

import pytest
from hvtest_agent import MemoryAgents
from hvtest_control_plane import (
    add_node,
    allocation_is_sum,
    control_plane,
    draft,
    fake_driver,
    mutation,
    registration,
    until,
)

from hypervisor.core.errors import (
    AlreadyExists,
    Cancelled,
    Conflict,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, OperationState
from hypervisor.server.services import Caller, InstanceRef, StopOptions
from hypervisor.server.store.storage import Storage

FORCE = StopOptions(grace_s=0.0)


async def test_create_stop_start_restart_delete(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        instances = plane.instances

        created = await instances.create(draft("web"), mutation())
        made = instances.resolve(InstanceRef("web")).value
        assert created.value.state is OperationState.SUCCEEDED
        assert (made.status, made.node_id, made.operation_id) == (InstanceStatus.RUNNING, node_id, "")
        assert made.runtime == "memory 1"
        assert agents.by_node[node_id].holds() == {made.id}

        await instances.stop(InstanceRef("web"), mutation(), options=StopOptions(1.0))
        stopped = instances.resolve(InstanceRef("web")).value
        assert (stopped.status, stopped.exit_code) == (InstanceStatus.STOPPED, 143)
        assert stopped.desired is DesiredState.STOPPED

        await instances.start(InstanceRef(made.id), mutation())
        assert instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING

        await instances.restart(InstanceRef("web"), mutation(), options=FORCE)
        assert instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING
        assert (await allocation_is_sum(storage))[node_id].instances == 1

        with pytest.raises(FailedPrecondition, match="stop it first") as refused:
            await instances.delete(InstanceRef("web"), mutation(), options=FORCE, force=False)
        assert refused.value.reason == "INSTANCE_RUNNING"
        await instances.delete(InstanceRef("web"), mutation(), options=FORCE, force=True)

        with pytest.raises(NotFound):
            instances.resolve(InstanceRef("web"))
        assert agents.by_node[node_id].holds() == set()
        assert (await allocation_is_sum(storage))[node_id].instances == 0


async def test_hundred_creates_at_once_run_or_are_refused_for_capacity(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration(cpu_cores=40)) as node_id:
        results = await asyncio.gather(
            *(plane.instances.create(draft(f"i{n}"), mutation()) for n in range(100)), return_exceptions=True
        )

        refused = [r for r in results if isinstance(r, ResourceExhausted)]
        assert len(refused) == 60
        assert {r.reason for r in refused} == {"NO_NODE_FITS"}
        assert refused[0].metadata["node.node-1"] == "needs 1 cores, 0 free of 40"
        assert [i.value.status for i in plane.view.instances()] == [InstanceStatus.RUNNING] * 40
        held = await allocation_is_sum(storage)
        assert held[node_id].reserved.cpu_millis == 40_000
        assert len(agents.by_node[node_id].holds()) == 40
        assert plane.committer.commits < 60, "reservations share transactions"
