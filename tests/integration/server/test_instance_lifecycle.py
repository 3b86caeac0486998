"""Instances through the whole control plane, with real stores and agents in memory."""

import asyncio
from dataclasses import replace

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
    async with (
        control_plane(storage, agents) as plane,
        add_node(plane, registration(cpu_cores=40)) as node_id,
    ):
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


async def test_a_failed_create_leaves_nothing_but_its_operation(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        agent = agents.by_node.setdefault(node_id, agents.agent(plane.nodes.resolve(node_id).value))
        agent.failures["create"] = NotFound("there is no image busybox", reason="IMAGE_NOT_FOUND")

        with pytest.raises(NotFound, match="no image") as failed:
            await plane.instances.create(draft("web"), mutation())

        operation = plane.operations.get(failed.value.metadata["operation_id"]).value
        assert failed.value.reason == "IMAGE_NOT_FOUND"
        assert (operation.state, operation.object_name) == (OperationState.FAILED, "web")
        assert list(plane.view.instances()) == []
        assert (await allocation_is_sum(storage))[node_id].instances == 0
        await plane.instances.create(draft("web"), mutation())


async def test_a_name_can_be_used_once_in_a_project(storage: Storage) -> None:
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, registration(cpu_cores=40)):
        results = await asyncio.gather(
            *(plane.instances.create(draft("web"), mutation()) for _ in range(10)), return_exceptions=True
        )

        refused = [r for r in results if isinstance(r, AlreadyExists)]
        assert len(refused) == 9
        assert {r.reason for r in refused} == {"INSTANCE_NAME_TAKEN"}
        await allocation_is_sum(storage)


async def test_a_repeated_request_has_no_second_effect(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        first, second = await asyncio.gather(
            plane.instances.create(draft("web"), mutation("r-1")),
            plane.instances.create(draft("web"), mutation("r-1")),
        )
        third = await plane.instances.create(draft("web"), mutation("r-1"))

        assert first.value.id == second.value.id == third.value.id
        assert plane.operations.get("r-1") == third
        assert [verb for verb, _ in agents.by_node[node_id].calls] == ["create"]

        with pytest.raises(InvalidArgument, match="fresh one") as reused:
            await plane.instances.create(draft("other"), mutation("r-1", digest="another"))
        assert reused.value.reason == "REQUEST_ID_REUSED"


async def test_a_repeated_request_gets_the_error_of_its_operation(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        agents.agent(plane.nodes.resolve(node_id).value).failures["create"] = InvalidArgument(
            "not an image", reason="IMAGE_INVALID"
        )
        errors = []
        for _ in range(2):
            with pytest.raises(InvalidArgument) as failed:
                await plane.instances.create(draft("web"), mutation("r-1"))
            errors.append((failed.value.reason, failed.value.metadata["operation_id"]))

        assert errors[0] == errors[1]


async def test_one_operation_at_a_time_per_instance(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        await plane.instances.create(draft("web"), mutation())
        gate = agents.by_node[node_id].gates["stop"] = asyncio.Event()
        stopping = await plane.instances.stop(InstanceRef("web"), mutation(wait=False), options=FORCE)

        with pytest.raises(Conflict) as refused:
            await plane.instances.restart(InstanceRef("web"), mutation(), options=FORCE)
        gate.set()
        done = await plane.operations.wait(stopping.value.id, timeout_s=5)

        assert refused.value.reason == "CONCURRENT_OPERATION"
        assert refused.value.metadata["operation_id"] == stopping.value.id
        assert done.value.state is OperationState.SUCCEEDED


async def test_verbs_are_refused_in_the_wrong_state(storage: Storage) -> None:
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, registration()):
        await plane.instances.create(draft("web"), mutation())

        with pytest.raises(FailedPrecondition) as running:
            await plane.instances.start(InstanceRef("web"), mutation())
        await plane.instances.stop(InstanceRef("web"), mutation(), options=FORCE)
        with pytest.raises(FailedPrecondition) as stopped:
            await plane.instances.stop(InstanceRef("web"), mutation(), options=FORCE)
        with pytest.raises(NotFound) as missing:
            await plane.instances.stop(InstanceRef("nothing"), mutation(), options=FORCE)
        seen = plane.instances.resolve(InstanceRef("web")).revision
        with pytest.raises(Conflict) as outdated:
            await plane.instances.start(InstanceRef("web", resource_version=seen - 1), mutation())
        await plane.instances.start(InstanceRef("web", resource_version=seen), mutation())

        reasons = [e.value.reason for e in (running, stopped, missing, outdated)]
        assert reasons == [
            "ALREADY_RUNNING",
            "NOT_RUNNING",
            "INSTANCE_NOT_FOUND",
            "RESOURCE_VERSION_MISMATCH",
        ]


async def test_what_the_driver_lacks_is_refused_before_anything_is_recorded(storage: Storage) -> None:
    joining = registration(drivers=(fake_driver(lacks={"restart": "it cannot"}),))
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation())
        before = await storage.current_revision()

        with pytest.raises(Unimplemented, match="it cannot") as refused:
            await plane.instances.restart(InstanceRef("web"), mutation(), options=FORCE)

        assert refused.value.reason == "CAPABILITY_MISSING"
        assert await storage.current_revision() == before


async def test_a_cancelled_create_is_undone(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        agents.agent(plane.nodes.resolve(node_id).value).gates["create"] = asyncio.Event()
        creating = asyncio.create_task(plane.instances.create(draft("web"), mutation("r-1")))
        await until(lambda: any(i.value.status is InstanceStatus.CREATING for i in plane.view.instances()))

        asked = await plane.operations.cancel("r-1", Caller("bob", "x"))
        with pytest.raises(Cancelled) as cancelled:
            await creating

        operation = plane.operations.get("r-1").value
        assert asked.value.cancel_requested
        assert cancelled.value.reason == "OPERATION_CANCELLED"
        assert operation.state is OperationState.CANCELLED
        assert list(plane.view.instances()) == []
        assert agents.by_node[node_id].holds() == set()
        assert (await allocation_is_sum(storage))[node_id].instances == 0
        with pytest.raises(FailedPrecondition) as over:
            await plane.operations.cancel("r-1", Caller("bob", "x"))
        assert over.value.reason == "OPERATION_DONE"


async def test_a_stop_cannot_be_cancelled(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        await plane.instances.create(draft("web"), mutation())
        gate = agents.by_node[node_id].gates["stop"] = asyncio.Event()
        stopping = await plane.instances.stop(InstanceRef("web"), mutation(wait=False), options=FORCE)

        with pytest.raises(FailedPrecondition) as refused:
            await plane.operations.cancel(stopping.value.id, Caller("bob", "x"))

        gate.set()
        assert refused.value.reason == "NOT_CANCELLABLE"


async def test_a_caller_that_goes_away_does_not_stop_its_operation(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        gate = agents.agent(plane.nodes.resolve(node_id).value).gates["create"] = asyncio.Event()
        creating = asyncio.create_task(plane.instances.create(draft("web"), mutation("r-1")))
        await until(lambda: bool(agents.by_node[node_id].calls))

        creating.cancel()
        await asyncio.wait({creating})
        gate.set()
        done = await plane.operations.wait("r-1", timeout_s=5)

        assert done.value.state is OperationState.SUCCEEDED
        assert plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING


async def test_an_instance_that_ends_at_once_is_shown_as_it_ended(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        agents.agent(plane.nodes.resolve(node_id).value).exits_at_once = 3

        created = await plane.instances.create(draft("job"), mutation())

        made = plane.instances.resolve(InstanceRef("job")).value
        assert created.value.state is OperationState.SUCCEEDED
        assert (made.status, made.status_reason, made.exit_code) == (InstanceStatus.FAILED, "EXITED", 3)


async def test_created_stopped_when_asked_for(storage: Storage) -> None:
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, registration()):
        wanted = draft("web")
        stopped = type(wanted)(
            name="web",
            project="default",
            type=InstanceType.CONTAINER,
            spec=wanted.spec,
            labels={"a": "b"},
            desired=DesiredState.STOPPED,
        )

        await plane.instances.create(stopped, mutation())

        made = plane.instances.resolve(InstanceRef("web")).value
        assert (made.status, made.labels) == (InstanceStatus.STOPPED, {"a": "b"})


async def test_plan_places_without_recording(storage: Storage) -> None:
    async with control_plane(storage, MemoryAgents()) as plane, add_node(plane, registration()) as node_id:
        before = await storage.current_revision()

        planned = await plane.instances.plan(draft("web"))
        with pytest.raises(ResourceExhausted):
            await plane.instances.plan(draft("big", cpu_cores=5))

        assert (planned.id, planned.node_id) == ("", node_id)
        assert await storage.current_revision() == before


async def test_a_cancelled_start_leaves_the_instance_stopped(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation())
        await plane.instances.stop(InstanceRef("web"), mutation(), options=StopOptions())
        agent = agents.by_node[joining.id]
        agent.gates["start"] = asyncio.Event()
        begun = await plane.instances.start(InstanceRef("web"), mutation(wait=False))
        await until(lambda: agent.calls[-1][0] == "start")

        await plane.operations.cancel(begun.value.id, Caller("alice", "x"))
        ended = await plane.operations.wait(begun.value.id, timeout_s=10)

        web = plane.instances.resolve(InstanceRef("web")).value
        assert ended.value.state is OperationState.CANCELLED
        assert (web.status, web.desired) == (InstanceStatus.STOPPED, DesiredState.STOPPED)


async def test_after_a_stop_that_failed_a_crash_is_a_failure(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation())
        agent = agents.by_node[joining.id]
        agent.failures["stop"] = FailedPrecondition("it cannot be signalled", reason="STOP_FAILED")
        with pytest.raises(FailedPrecondition):
            await plane.instances.stop(InstanceRef("web"), mutation(), options=FORCE)
        running = plane.instances.resolve(InstanceRef("web")).value

        await plane.nodes.update_status(
            joining.id, joining.incarnation, drivers=None, observations=(agent.end(running.id, exit_code=1),)
        )

        ended = plane.instances.resolve(InstanceRef("web")).value
        assert (running.status, running.desired) == (InstanceStatus.RUNNING, DesiredState.RUNNING)
        assert (ended.status, ended.status_reason) == (InstanceStatus.FAILED, "EXITED")


async def test_a_request_id_names_the_callers_own_operation_to_cancel(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        agents.agent(plane.nodes.resolve(joining.id).value).gates["create"] = asyncio.Event()
        bobs = replace(mutation("r-1", wait=False), caller=Caller("bob", "x"))
        own = await plane.instances.create(draft("alices"), mutation("r-1", wait=False))
        other = await plane.instances.create(draft("bobs"), bobs)

        cancelled = await plane.operations.cancel("r-1", Caller("alice", "x"))

        assert cancelled.value.id == own.value.id
        assert not plane.operations.get(other.value.id).value.cancel_requested
