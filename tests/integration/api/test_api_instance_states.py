"""Freezing, suspending and snapshots over real gRPC, with a whole server and a whole agent."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of, whole_agent
from hypervisor.core.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted
from hypervisor.v1 import cluster_pb2, instance_pb2, operation_pb2
from hypervisor.v1 import compute_pb2 as compute

RUNNING = instance_pb2.INSTANCE_STATUS_RUNNING
PAUSED = instance_pb2.INSTANCE_STATUS_PAUSED
STOPPED = instance_pb2.INSTANCE_STATUS_STOPPED


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), failure_of(failed.value).reason


@pytest.fixture
async def web(server: WholeServer, agent: WholeAgent) -> WholeServer:
    """A running instance named web."""
    await server.compute.CreateInstance(container("web"))
    return server


async def shown(server: WholeServer) -> instance_pb2.Instance:
    return await server.compute.GetInstance(compute.GetInstanceRequest(instance="web"))


async def snapshots(server: WholeServer) -> list[str]:
    listed = await server.compute.ListSnapshots(compute.ListSnapshotsRequest(instance="web"))
    return [kept.name for kept in listed.snapshots]


async def test_pause_and_resume(web: WholeServer) -> None:
    paused = await web.compute.PauseInstance(compute.PauseInstanceRequest(instance="web"))
    record = await shown(web)
    resumed = await web.compute.ResumeInstance(compute.ResumeInstanceRequest(instance="web"))

    assert (paused.verb, paused.done, paused.instance.status) == ("pause", True, PAUSED)
    assert (record.status, record.desired_state) == (PAUSED, instance_pb2.DESIRED_STATE_PAUSED)
    assert (resumed.instance.status, resumed.instance.desired_state) == (
        RUNNING,
        instance_pb2.DESIRED_STATE_RUNNING,
    )


async def test_what_does_not_fit_the_state_is_refused(web: WholeServer) -> None:
    precondition = grpc.StatusCode.FAILED_PRECONDITION

    assert await refusal(web.compute.ResumeInstance(compute.ResumeInstanceRequest(instance="web"))) == (
        precondition,
        "NOT_PAUSED",
    )
    await web.compute.StopInstance(compute.StopInstanceRequest(instance="web"))
    for call in (
        web.compute.PauseInstance(compute.PauseInstanceRequest(instance="web")),
        web.compute.SuspendInstance(compute.SuspendInstanceRequest(instance="web")),
    ):
        assert await refusal(call) == (precondition, "NOT_RUNNING")


async def test_a_paused_instance_is_not_started_but_stopped(web: WholeServer) -> None:
    await web.compute.PauseInstance(compute.PauseInstanceRequest(instance="web"))

    code, reason = await refusal(web.compute.StartInstance(compute.StartInstanceRequest(instance="web")))
    stopped = await web.compute.StopInstance(compute.StopInstanceRequest(instance="web"))

    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ALREADY_RUNNING")
    assert stopped.instance.status == STOPPED


async def test_a_suspended_instance_is_stopped_and_says_so(web: WholeServer) -> None:
    suspended = await web.compute.SuspendInstance(compute.SuspendInstanceRequest(instance="web"))
    started = await web.compute.StartInstance(compute.StartInstanceRequest(instance="web"))

    assert (suspended.instance.status, suspended.instance.status_reason) == (STOPPED, "SUSPENDED")
    assert suspended.instance.desired_state == instance_pb2.DESIRED_STATE_STOPPED
    assert started.instance.status == RUNNING


async def test_a_snapshot_from_create_to_delete(web: WholeServer) -> None:
    made = await web.compute.CreateSnapshot(compute.CreateSnapshotRequest(instance="web", snapshot="first"))
    await web.compute.CreateSnapshot(
        compute.CreateSnapshotRequest(instance="web", snapshot="second", kind=instance_pb2.SNAPSHOT_KIND_DIFF)
    )
    listed = await web.compute.ListSnapshots(compute.ListSnapshotsRequest(instance="web"))
    await web.compute.StopInstance(compute.StopInstanceRequest(instance="web"))
    restored = await web.compute.RestoreSnapshot(
        compute.RestoreSnapshotRequest(instance="web", snapshot="second")
    )
    deleted = await web.compute.DeleteSnapshot(
        compute.DeleteSnapshotRequest(instance="web", snapshot="second")
    )

    assert (made.verb, made.done, made.instance.status) == ("create-snapshot", True, RUNNING)
    assert [(kept.name, kept.memory) for kept in listed.snapshots] == [("first", True), ("second", True)]
    assert listed.snapshots[1].kind == instance_pb2.SNAPSHOT_KIND_DIFF
    assert listed.snapshots[0].HasField("created_at")
    assert (restored.instance.status, restored.instance.desired_state) == (
        RUNNING,
        instance_pb2.DESIRED_STATE_RUNNING,
    )
    assert deleted.done
    assert await snapshots(web) == ["first"]


async def test_a_snapshot_of_a_paused_instance_brings_back_a_paused_one(web: WholeServer) -> None:
    await web.compute.PauseInstance(compute.PauseInstanceRequest(instance="web"))
    await web.compute.CreateSnapshot(compute.CreateSnapshotRequest(instance="web", snapshot="cold"))
    await web.compute.StopInstance(compute.StopInstanceRequest(instance="web"))

    restored = await web.compute.RestoreSnapshot(
        compute.RestoreSnapshotRequest(instance="web", snapshot="cold")
    )

    assert (restored.instance.status, restored.instance.desired_state) == (
        PAUSED,
        instance_pb2.DESIRED_STATE_PAUSED,
    )


async def test_an_unknown_snapshot_leaves_the_instance_as_it_was(web: WholeServer) -> None:
    request = compute.RestoreSnapshotRequest(instance="web", snapshot="nothing")

    assert await refusal(web.compute.RestoreSnapshot(request)) == (
        grpc.StatusCode.NOT_FOUND,
        "SNAPSHOT_NOT_FOUND",
    )

    record = await shown(web)
    assert (record.status, record.desired_state) == (RUNNING, instance_pb2.DESIRED_STATE_RUNNING)
    assert not record.operation_id


async def test_the_base_of_a_diff_is_kept(web: WholeServer) -> None:
    await web.compute.CreateSnapshot(compute.CreateSnapshotRequest(instance="web", snapshot="base"))
    await web.compute.CreateSnapshot(
        compute.CreateSnapshotRequest(instance="web", snapshot="top", kind=instance_pb2.SNAPSHOT_KIND_DIFF)
    )

    refused = await refusal(
        web.compute.DeleteSnapshot(compute.DeleteSnapshotRequest(instance="web", snapshot="base"))
    )

    assert refused == (grpc.StatusCode.FAILED_PRECONDITION, "SNAPSHOT_IN_USE")
    assert await snapshots(web) == ["base", "top"]


@pytest.mark.parametrize("name", ["", "Upper", "../up", "a" * 64, "nul\0", "-dash"])
async def test_an_illegal_name_is_named(web: WholeServer, name: str) -> None:
    request = compute.CreateSnapshotRequest(instance="web", snapshot=name)

    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await web.compute.CreateSnapshot(request)

    error = failure_of(failed.value)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["snapshot"]


async def test_a_pause_that_fails_leaves_it_wanted_running(web: WholeServer, agent: WholeAgent) -> None:
    agent.driver.faults.fail("pause", ResourceExhausted("no room to freeze it", reason="DISK_FULL"))

    refused = await refusal(web.compute.PauseInstance(compute.PauseInstanceRequest(instance="web")))

    assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    record = await shown(web)
    assert (record.status, record.desired_state) == (RUNNING, instance_pb2.DESIRED_STATE_RUNNING)


async def test_a_repeat_with_its_request_id_has_no_second_effect(web: WholeServer) -> None:
    request = compute.CreateSnapshotRequest(instance="web", snapshot="once", request_id="77aa")
    first = await web.compute.CreateSnapshot(request)
    await web.compute.DeleteSnapshot(compute.DeleteSnapshotRequest(instance="web", snapshot="once"))

    again = await web.compute.CreateSnapshot(request)

    assert again.id == first.id
    assert await snapshots(web) == []


async def test_what_a_driver_lacks_is_refused_with_its_reason(server: WholeServer, tmp_path: Path) -> None:
    lacks = ("pause", "suspend", "snapshot", "snapshot-diff")
    async with whole_agent(server, tmp_path, hostname="poor", lacks=lacks):
        await server.compute.CreateInstance(container("web"))
        for call in (
            server.compute.PauseInstance(compute.PauseInstanceRequest(instance="web")),
            server.compute.SuspendInstance(compute.SuspendInstanceRequest(instance="web")),
            server.compute.CreateSnapshot(compute.CreateSnapshotRequest(instance="web", snapshot="s")),
            server.compute.ListSnapshots(compute.ListSnapshotsRequest(instance="web")),
        ):
            assert await refusal(call) == (grpc.StatusCode.UNIMPLEMENTED, "CAPABILITY_MISSING")

        listed = await server.operations.ListOperations(operation_pb2.ListOperationsRequest())
        assert [operation.verb for operation in listed.operations] == ["create"]


async def test_a_diff_where_the_driver_has_only_full_ones_is_refused(
    server: WholeServer, tmp_path: Path
) -> None:
    async with whole_agent(server, tmp_path, hostname="full", lacks=("snapshot-diff",)):
        await server.compute.CreateInstance(container("web"))
        await server.compute.CreateSnapshot(compute.CreateSnapshotRequest(instance="web", snapshot="full"))

        refused = await refusal(
            server.compute.CreateSnapshot(
                compute.CreateSnapshotRequest(
                    instance="web", snapshot="diff", kind=instance_pb2.SNAPSHOT_KIND_DIFF
                )
            )
        )

        assert refused == (grpc.StatusCode.UNIMPLEMENTED, "CAPABILITY_MISSING")
        assert await snapshots(server) == ["full"]


# -- sizes -----------------------------------------------------------------------------------------------------------


def sized(**spec: Any) -> compute.UpdateInstanceRequest:
    return compute.UpdateInstanceRequest(instance={"name": "web", "spec": spec})


async def reserved(server: WholeServer) -> tuple[float, int]:
    node = await server.cluster.GetNode(cluster_pb2.GetNodeRequest(node="node-1"))
    return node.reservation.cpu_cores, node.reservation.memory_bytes >> 20


async def test_a_running_instance_gets_other_sizes_and_its_node_reserves_them(web: WholeServer) -> None:
    before = await reserved(web)

    grown = await web.compute.UpdateInstance(sized(cpu_cores=0.5, memory_mb=64))
    after = await reserved(web)
    shrunk = await web.compute.UpdateInstance(sized(memory_mb=32))

    assert before == (0.01, 16)
    assert (grown.verb, grown.done, grown.instance.status) == ("update", True, RUNNING)
    assert (grown.instance.spec.cpu_cores, grown.instance.spec.memory_mb) == (0.5, 64)
    assert after == (0.5, 64)
    assert (shrunk.instance.spec.cpu_cores, shrunk.instance.spec.memory_mb) == (0.5, 32)
    assert await reserved(web) == (0.5, 32)
    assert shrunk.instance.generation == 1
    await web.compute.DeleteInstance(compute.DeleteInstanceRequest(instance="web", force=True))
    assert await reserved(web) == (0.0, 0)


async def test_more_than_its_node_has_is_refused_and_changes_nothing(web: WholeServer) -> None:
    refused = await refusal(web.compute.UpdateInstance(sized(memory_mb=16_000_000)))

    assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_FULL")
    assert await reserved(web) == (0.01, 16)
    record = await shown(web)
    assert (record.spec.memory_mb, record.operation_id) == (16, "")


async def test_what_the_driver_refuses_gives_the_reservation_back(
    web: WholeServer, agent: WholeAgent
) -> None:
    agent.driver.faults.fail("update", FailedPrecondition("its guest cannot", reason="UPDATE_REFUSED"))

    refused = await refusal(web.compute.UpdateInstance(sized(memory_mb=64)))

    assert refused == (grpc.StatusCode.FAILED_PRECONDITION, "UPDATE_REFUSED")
    assert await reserved(web) == (0.01, 16)
    record = await shown(web)
    assert (record.spec.memory_mb, record.status) == (16, RUNNING)


async def test_both_sizes_stay_reserved_while_nobody_can_tell_what_came_of_it(
    web: WholeServer, agent: WholeAgent
) -> None:
    agent.driver.faults.fail("update", DeadlineExceeded("it hangs", reason="DRIVER_TIMEOUT"))

    await refusal(web.compute.UpdateInstance(sized(cpu_cores=0.005, memory_mb=64)))
    unclear = await reserved(web)
    await within_time(web)
    repeated = await web.compute.UpdateInstance(sized(cpu_cores=0.005, memory_mb=64))

    assert unclear == (0.01, 64)
    assert repeated.instance.spec.memory_mb == 64
    assert await reserved(web) == (0.005, 64)


async def within_time(server: WholeServer) -> None:
    """The reconciler has asked the node how the instance is."""
    async with asyncio.timeout(10):
        while (await shown(server)).status != RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (compute.UpdateInstanceRequest(), ["instance.name", "instance.spec"]),
        (sized(), ["instance.spec"]),
        (sized(cpu_cores=-1.0), ["instance.spec.cpu_cores"]),
        (sized(memory_mb=1), ["instance.spec.memory_mb"]),
        (sized(image="other", memory_mb=64), ["instance.spec.image"]),
        (
            compute.UpdateInstanceRequest(instance={"name": "web", "labels": {"a": "b"}}),
            ["instance.labels"],
        ),
        (
            compute.UpdateInstanceRequest(
                instance={"name": "web", "spec": {"memory_mb": 64}}, update_mask={"paths": ["spec.image"]}
            ),
            ["update_mask"],
        ),
        (
            compute.UpdateInstanceRequest(
                instance={"name": "web"}, update_mask={"paths": ["spec.cpu_cores"]}
            ),
            ["instance.spec.cpu_cores"],
        ),
    ],
)
async def test_what_cannot_be_updated_is_named(
    web: WholeServer, request_: compute.UpdateInstanceRequest, fields: list[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await web.compute.UpdateInstance(request_)

    error = failure_of(failed.value)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == fields


async def test_a_mask_leaves_out_what_is_set_besides(web: WholeServer) -> None:
    request = sized(cpu_cores=0.5, memory_mb=64)
    request.update_mask.paths.append("spec.memory_mb")

    updated = await web.compute.UpdateInstance(request)

    assert (updated.instance.spec.cpu_cores, updated.instance.spec.memory_mb) == (0.01, 64)
