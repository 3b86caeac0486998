"""AgentService over real gRPC: codes, reasons and answers as agent.proto says."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import HypervisorError, InvalidArgument
from hypervisor.core.grpc_errors import from_rpc_error
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2
from hypervisor.wire.times import duration_of

StartAgent = Callable[..., Any]
RUNNING = instance_pb2.INSTANCE_STATUS_RUNNING
STOPPED = instance_pb2.INSTANCE_STATUS_STOPPED


def _create(**more: Any) -> agent_pb2.CreateInstanceRequest:
    fields = {
        "ref": agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=1),
        "name": "web",
        "project": "default",
        "type": instance_pb2.INSTANCE_TYPE_CONTAINER,
        "spec": instance_pb2.InstanceSpec(image="fake", memory_mb=64),
        "start": True,
    }
    return agent_pb2.CreateInstanceRequest(**{**fields, **more})


async def _error(call: Any) -> tuple[grpc.StatusCode, HypervisorError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc_error(caught.value, peer="agent")


async def test_the_life_of_an_instance(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = _create()
        created = await agent.stub.CreateInstance(request)
        stopped = await agent.stub.StopInstance(
            agent_pb2.StopInstanceRequest(ref=request.ref, grace_period=duration_of(1.0))
        )
        started = await agent.stub.StartInstance(agent_pb2.StartInstanceRequest(ref=request.ref))
        restarted = await agent.stub.RestartInstance(agent_pb2.RestartInstanceRequest(ref=request.ref))
        listed = await agent.stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest())
        deleted = await agent.stub.DeleteInstance(agent_pb2.DeleteInstanceRequest(ref=request.ref))
        again = await agent.stub.DeleteInstance(agent_pb2.DeleteInstanceRequest(ref=request.ref))

    statuses = [r.instance.status for r in (created, stopped, started, restarted)]
    assert statuses == [RUNNING, STOPPED, RUNNING, RUNNING]
    sequences = [r.instance.sequence for r in (created, stopped, started, restarted)]
    assert sequences == sorted(set(sequences))
    assert [o.instance_id for o in listed.instances] == [request.ref.id]
    assert (deleted.existed, again.existed) == (True, False)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ref": agent_pb2.InstanceRef(id="../../etc", generation=1, epoch=1)}, "ref.id"),
        ({"ref": agent_pb2.InstanceRef(id="", generation=1, epoch=1)}, "ref.id"),
        ({"ref": agent_pb2.InstanceRef(id=new_id("i"), generation=0, epoch=1)}, "ref.generation"),
        ({"ref": agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=0)}, "ref.epoch"),
        ({"name": ""}, "name"),
        ({"project": ""}, "project"),
        ({"type": 0}, "type"),
        ({"type": 99}, "type"),
        ({"spec": instance_pb2.InstanceSpec(image="")}, "spec.image"),
    ],
)
async def test_a_wrong_create_names_the_field_and_makes_nothing(
    start_agent: StartAgent, change: dict[str, Any], field: str
) -> None:
    async with start_agent() as agent:
        code, error = await _error(agent.stub.CreateInstance(_create(**change)))

        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert [v.field for v in error.violations] == [field]
        listed = await agent.stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest())
        assert list(listed.instances) == []


@pytest.mark.parametrize("grace_s", [-1.0, 3601.0])
async def test_a_wrong_grace_is_refused(start_agent: StartAgent, grace_s: float) -> None:
    async with start_agent() as agent:
        ref = agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=1)
        code, error = await _error(
            agent.stub.StopInstance(agent_pb2.StopInstanceRequest(ref=ref, grace_period=duration_of(grace_s)))
        )

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in error.violations] == ["grace_period"]


async def test_a_missing_image_is_not_found(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        spec = instance_pb2.InstanceSpec(image="missing")
        code, error = await _error(agent.stub.CreateInstance(_create(spec=spec)))

    assert (code, error.reason) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")


async def test_a_type_that_no_driver_here_runs_is_unimplemented(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = _create(type=instance_pb2.INSTANCE_TYPE_VM)
        code, error = await _error(agent.stub.CreateInstance(request))

    assert (code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "CAPABILITY_MISSING")


async def test_a_dead_runtime_is_unavailable(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        agent.driver.faults.lose_runtime()
        code, error = await _error(agent.stub.CreateInstance(_create()))

    assert (code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRIVER_UNAVAILABLE")


async def test_a_defect_is_internal_and_its_text_stays_in_the_log(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        agent.driver.faults.fail("create", ZeroDivisionError("a secret detail"))
        code, error = await _error(agent.stub.CreateInstance(_create()))

    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in error.message


async def test_an_older_epoch_is_a_failed_precondition(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = _create(ref=agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=3))
        await agent.stub.CreateInstance(request)
        old = agent_pb2.InstanceRef(id=request.ref.id, generation=1, epoch=2)
        code, error = await _error(agent.stub.StopInstance(agent_pb2.StopInstanceRequest(ref=old)))

    assert (code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")


async def test_reconcile_says_what_to_do_instead(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        code, error = await _error(agent.stub.Reconcile(agent_pb2.ReconcileRequest()))

    assert (code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "CAPABILITY_MISSING")
    assert "ListLocalInstances" in error.message


async def test_stats_rise_and_end_with_the_instance(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = _create()
        await agent.stub.CreateInstance(request)
        watch = agent_pb2.WatchInstanceStatsRequest(instance_id=request.ref.id, interval=duration_of(0.1))
        samples = []

        async def collect() -> None:
            async for sample in agent.stub.WatchInstanceStats(watch):
                samples.append(sample)
                if len(samples) == 3:
                    await agent.driver.exit(request.ref.id, 0)

        await within(collect(), what="the stream ends with the instance")

    used = [sample.cpu_usage_ns for sample in samples]
    assert len(used) >= 3
    assert used == sorted(set(used))


async def test_stats_of_a_stopped_instance_are_refused(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = _create(start=False)
        await agent.stub.CreateInstance(request)
        once = await _error(
            agent.stub.GetInstanceStats(agent_pb2.GetInstanceStatsRequest(instance_id=request.ref.id))
        )
        watch = agent_pb2.WatchInstanceStatsRequest(instance_id=request.ref.id)
        streamed = await _error(anext(aiter(agent.stub.WatchInstanceStats(watch))))

    assert (once[0], once[1].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_RUNNING")
    assert (streamed[0], streamed[1].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_RUNNING")


async def test_a_stats_interval_below_100_ms_is_refused(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        watch = agent_pb2.WatchInstanceStatsRequest(instance_id=new_id("i"), interval=duration_of(0.05))
        code, error = await _error(anext(aiter(agent.stub.WatchInstanceStats(watch))))

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in error.violations] == ["interval"]


async def test_node_resources_name_the_drivers(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        reply = await agent.stub.GetNodeResources(agent_pb2.GetNodeResourcesRequest())

    assert reply.resources.memory_bytes > 0
    assert [driver.name for driver in reply.drivers] == ["fake"]


async def test_the_callers_request_id_comes_back_with_an_error(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = agent_pb2.GetInstanceStatsRequest(instance_id=new_id("i"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await agent.stub.GetInstanceStats(request, metadata=(("x-request-id", "r-42"),))

    assert ("x-request-id", "r-42") in list(caught.value.trailing_metadata())


async def test_health_and_reflection_answer(start_agent: StartAgent) -> None:
    async with start_agent() as agent, grpc.aio.insecure_channel(agent.address) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="hypervisor.agent.v1.AgentService")
        )
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        services = {s.name async for r in call for s in r.list_services_response.service}

    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert {"hypervisor.agent.v1.AgentService", "grpc.health.v1.Health"} <= services


async def test_a_hundred_creates_at_once_all_run(start_agent: StartAgent, server: ClusterDouble) -> None:
    async with start_agent() as agent:
        replies = await asyncio.gather(*(agent.stub.CreateInstance(_create()) for _ in range(100)))
        listed = await agent.stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest())

    assert {r.instance.status for r in replies} == {RUNNING}
    assert {o.instance_id for o in listed.instances} == {r.instance.instance_id for r in replies}


async def test_a_create_whose_caller_hung_up_is_finished_and_reported(
    start_agent: StartAgent, server: ClusterDouble
) -> None:
    async with start_agent() as agent:
        agent.driver.faults.hang("start")
        request = _create()
        code, _ = await _error(agent.stub.CreateInstance(request, timeout=0.3))
        agent.driver.faults.release("start")

        known = server.nodes[agent.node_id]
        seen = await until(lambda: known.instances.get(request.ref.id), what="the outcome is reported")

    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert seen.status == RUNNING


async def test_errors_of_the_driver_keep_their_reason(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        agent.driver.faults.fail(
            "create",
            InvalidArgument.of_field("spec.command", "is no program of the image", reason="COMMAND_INVALID"),
        )
        code, error = await _error(agent.stub.CreateInstance(_create()))

    assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "COMMAND_INVALID")
