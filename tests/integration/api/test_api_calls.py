"""The public API over real gRPC, with a whole server and a whole agent: the verbs, and every refusal of bad input."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of
from hypervisor.core.ids import new_id
from hypervisor.v1 import cluster_pb2, compute_pb2, instance_pb2, node_pb2, operation_pb2

Code = grpc.StatusCode


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and sentence of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    error = failure_of(failed.value)
    assert error.message == failed.value.details()
    assert len(error.message) < 3000
    return failed.value.code(), error.reason, error.message


async def test_a_container_from_create_to_delete(server: WholeServer, agent: WholeAgent) -> None:
    compute = server.compute

    created = await compute.CreateInstance(container("web"))
    assert (created.verb, created.done, created.principal) == ("create", True, "anonymous")
    assert created.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING
    assert created.instance.node_id == agent.node_id

    shown = await compute.GetInstance(compute_pb2.GetInstanceRequest(instance="web"))
    assert shown.id == created.object_id
    assert shown.resource_version > 0
    stats = await compute.GetInstanceStats(compute_pb2.GetInstanceStatsRequest(instance="web"))
    assert stats.memory_limit_bytes == 16 << 20

    stopped = await compute.StopInstance(compute_pb2.StopInstanceRequest(instance="web"))
    assert stopped.instance.status == instance_pb2.INSTANCE_STATUS_STOPPED
    started = await compute.StartInstance(compute_pb2.StartInstanceRequest(instance=shown.id))
    assert started.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING
    restarted = await compute.RestartInstance(compute_pb2.RestartInstanceRequest(instance="web"))
    assert restarted.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING
    deleted = await compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance="web", force=True))
    assert not deleted.HasField("instance")
    assert (await compute.ListInstances(compute_pb2.ListInstancesRequest())).instances == []

    history = await server.operations.ListOperations(
        operation_pb2.ListOperationsRequest(filter=f"object_id={shown.id}")
    )
    assert [o.verb for o in history.operations] == ["delete", "restart", "start", "stop", "create"]
    assert {o.state for o in history.operations} == {operation_pb2.OPERATION_STATE_SUCCEEDED}


async def test_a_repeat_with_its_request_id_has_no_second_effect(
    server: WholeServer, agent: WholeAgent
) -> None:
    first = await server.compute.CreateInstance(container("web", request_id="4b0c"))
    again = await server.compute.CreateInstance(container("web", request_id="4b0c", no_wait=True))

    assert again.id == first.id
    known = await server.operations.GetOperation(operation_pb2.GetOperationRequest(operation="4b0c"))
    assert known.id == first.id
    code, reason, message = await refusal(server.compute.CreateInstance(container("db", request_id="4b0c")))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert "request_id" in message


async def test_validating_only_places_and_records_nothing(server: WholeServer, agent: WholeAgent) -> None:
    request = container("web")
    request.validate_only = True

    planned = await server.compute.CreateInstance(request)

    assert (planned.done, planned.id, planned.instance.id) == (True, "", "")
    assert planned.instance.node_id == agent.node_id
    listed = await server.operations.ListOperations(operation_pb2.ListOperationsRequest())
    assert listed.operations == []


async def test_not_waiting_answers_at_once_and_waiting_brings_the_end(
    server: WholeServer, agent: WholeAgent
) -> None:
    begun = await server.compute.CreateInstance(container("web", no_wait=True))
    ended = await server.operations.WaitOperation(operation_pb2.WaitOperationRequest(operation=begun.id))

    assert ended.state == operation_pb2.OPERATION_STATE_SUCCEEDED
    assert ended.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING


async def test_bad_input_is_refused_with_code_reason_and_remedy(
    server: WholeServer, agent: WholeAgent
) -> None:
    compute, cluster, operations = server.compute, server.cluster, server.operations
    await compute.CreateInstance(container("web"))
    await compute.CreateInstance(container("off"))
    await compute.StopInstance(compute_pb2.StopInstanceRequest(instance="off"))
    huge_name = container("x" * 10_000_000)
    zero, nowhere, unlabelled, missing_image = (container(n) for n in ("a", "b", "c", "d"))
    zero.instance.spec.memory_mb = 0
    nowhere.instance.spec.node = "no-such-node"
    unlabelled.instance.spec.node_selector.add(key="gpu", values=["a100"])
    missing_image.instance.spec.image = "missing"
    too_large = container("e")
    too_large.instance.spec.cpu_cores = 1024
    typeless = container("f")
    typeless.instance.type = instance_pb2.INSTANCE_TYPE_UNSPECIFIED

    expected: list[tuple[Callable[[], Any], grpc.StatusCode, str, str]] = [
        (
            lambda: compute.CreateInstance(container("")),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "instance.name: is required",
        ),
        (
            lambda: compute.CreateInstance(huge_name),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "is 10000000 characters long",
        ),
        (
            lambda: compute.CreateInstance(typeless),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "instance.type: is required",
        ),
        (
            lambda: compute.CreateInstance(zero),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "memory_mb: is 0: use 4 to",
        ),
        (lambda: compute.CreateInstance(container("web")), Code.ALREADY_EXISTS, "INSTANCE_NAME_TAKEN", "web"),
        (lambda: compute.CreateInstance(nowhere), Code.NOT_FOUND, "NODE_NOT_FOUND", "no-such-node"),
        (lambda: compute.CreateInstance(unlabelled), Code.FAILED_PRECONDITION, "UNKNOWN_NODE_LABEL", "gpu"),
        (lambda: compute.CreateInstance(too_large), Code.RESOURCE_EXHAUSTED, "NO_NODE_FITS", "no node fits"),
        (lambda: compute.CreateInstance(missing_image), Code.NOT_FOUND, "IMAGE_NOT_FOUND", "missing"),
        (
            lambda: compute.GetInstance(compute_pb2.GetInstanceRequest(instance="ghost")),
            Code.NOT_FOUND,
            "INSTANCE_NOT_FOUND",
            "ghost",
        ),
        (
            lambda: compute.GetInstance(compute_pb2.GetInstanceRequest()),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "is required",
        ),
        (
            lambda: compute.StopInstance(compute_pb2.StopInstanceRequest(instance="off")),
            Code.FAILED_PRECONDITION,
            "NOT_RUNNING",
            "off",
        ),
        (
            lambda: compute.StartInstance(compute_pb2.StartInstanceRequest(instance="web")),
            Code.FAILED_PRECONDITION,
            "ALREADY_RUNNING",
            "web",
        ),
        (
            lambda: compute.GetInstanceStats(compute_pb2.GetInstanceStatsRequest(instance="off")),
            Code.FAILED_PRECONDITION,
            "NOT_RUNNING",
            "start it first",
        ),
        (
            lambda: compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance="web")),
            Code.FAILED_PRECONDITION,
            "INSTANCE_RUNNING",
            "force",
        ),
        (
            lambda: compute.StopInstance(compute_pb2.StopInstanceRequest(instance="web", resource_version=1)),
            Code.ABORTED,
            "RESOURCE_VERSION_MISMATCH",
            "web",
        ),
        (
            lambda: compute.StopInstance(
                compute_pb2.StopInstanceRequest(
                    instance="web", stop=instance_pb2.StopOptions(grace_period=Duration(seconds=-1))
                )
            ),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "stop.grace_period: is -1 s: use 0 to 3600 s",
        ),
        (
            lambda: compute.ListInstances(
                compute_pb2.ListInstancesRequest(page_size=-1, filter="a", order_by="b")
            ),
            Code.INVALID_ARGUMENT,
            "INVALID_LIST_ARGUMENT",
            "page_size: is -1",
        ),
        (
            lambda: cluster.GetNode(cluster_pb2.GetNodeRequest(node="ghost")),
            Code.NOT_FOUND,
            "NODE_NOT_FOUND",
            "ghost",
        ),
        (
            lambda: cluster.CordonNode(cluster_pb2.CordonNodeRequest(node="node-1", reason="x" * 300)),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "reason: is 300 characters long: use at most 256",
        ),
        (
            lambda: cluster.DeregisterNode(cluster_pb2.DeregisterNodeRequest(node="node-1")),
            Code.FAILED_PRECONDITION,
            "NODE_HAS_INSTANCES",
            "node-1",
        ),
        (
            lambda: cluster.RegisterNode(cluster_pb2.RegisterNodeRequest(node=node_pb2.Node(id=new_id("n")))),
            Code.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "node.hostname: is required",
        ),
        (
            lambda: cluster.Heartbeat(cluster_pb2.HeartbeatRequest(node_id=new_id("n"), incarnation="1")),
            Code.NOT_FOUND,
            "NODE_NOT_FOUND",
            "",
        ),
        (
            lambda: operations.GetOperation(operation_pb2.GetOperationRequest(operation="ghost")),
            Code.NOT_FOUND,
            "OPERATION_NOT_FOUND",
            "ghost",
        ),
    ]
    for call, code, reason, words in expected:
        shown = await refusal(call())
        assert shown[:2] == (code, reason), shown
        assert words in shown[2]

    left = await compute.ListInstances(compute_pb2.ListInstancesRequest())
    assert [i.name for i in left.instances] == ["off", "web"]
    node = await cluster.GetNode(cluster_pb2.GetNodeRequest(node="node-1"))
    assert (node.reservation.instances, node.reservation.memory_bytes) == (2, 32 << 20)


async def test_a_request_beyond_grpcs_own_limit_is_refused_too(server: WholeServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await server.compute.CreateInstance(container("x" * (17 << 20)))

    assert failed.value.code() is Code.RESOURCE_EXHAUSTED
    assert "larger than max" in (failed.value.details() or "")


async def test_bytes_that_are_no_message_are_the_callers_fault(server: WholeServer) -> None:
    call: Any = server.channel.unary_unary("/hypervisor.v1.ComputeService/GetInstance")

    code, reason, message = await refusal(call(b"\xff\xff\xff"))

    assert (code, reason) == (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert "hypervisor.v1.GetInstanceRequest" in message


async def test_an_error_carries_the_request_id_of_the_call(server: WholeServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await server.compute.GetInstance(
            compute_pb2.GetInstanceRequest(instance="ghost"), metadata=(("x-request-id", "mine-1"),)
        )

    assert dict(failed.value.trailing_metadata())["x-request-id"] == "mine-1"


async def test_nodes_are_listed_cordoned_and_counted(server: WholeServer, agent: WholeAgent) -> None:
    cluster = server.cluster
    await cluster.CordonNode(cluster_pb2.CordonNodeRequest(node="node-1", reason="disk swap"))
    listed = await cluster.ListNodes(cluster_pb2.ListNodesRequest(filter="schedulable=false,labels.disk=ssd"))
    assert [(n.hostname, n.status_message) for n in listed.nodes] == [("node-1", "disk swap")]
    code, reason, _ = await refusal(server.compute.CreateInstance(container("web")))
    assert (code, reason) == (Code.RESOURCE_EXHAUSTED, "NO_NODE_FITS")

    undone = await cluster.UncordonNode(cluster_pb2.UncordonNodeRequest(node=agent.node_id))
    assert undone.node.schedulable
    await server.compute.CreateInstance(container("web"))
    info = await cluster.GetClusterInfo(cluster_pb2.GetClusterInfoRequest())

    assert (dict(info.nodes), dict(info.instances)) == ({"ready": 1}, {"running": 1})
    assert (info.store_backend, info.store_available, info.version) == ("sqlite", True, "1.2.3")
    assert [s.address for s in info.servers] == [server.addresses.grpc]
    assert info.reservation.instances == 1
    assert info.resources.memory_bytes > 0


async def test_pages_of_instances_join_to_the_whole(server: WholeServer, agent: WholeAgent) -> None:
    names = [f"i{n:02d}" for n in range(7)]
    await asyncio.gather(*(server.compute.CreateInstance(container(name)) for name in names))

    seen: list[str] = []
    token = ""
    while True:
        page = await server.compute.ListInstances(
            compute_pb2.ListInstancesRequest(page_size=3, page_token=token)
        )
        seen += [i.name for i in page.instances]
        token = page.next_page_token
        if not token:
            break

    assert seen == names
    found = await server.compute.ListInstances(
        compute_pb2.ListInstancesRequest(filter="name=i0*,status=running")
    )
    assert len(found.instances) == 7


async def test_a_stream_of_heartbeats_ends_with_the_error_of_one_and_leaves_others_alone(
    server: WholeServer, agent: WholeAgent
) -> None:
    nodes = await server.cluster.ListNodes(cluster_pb2.ListNodesRequest())
    stream = server.cluster.Heartbeats()
    stranger = cluster_pb2.HeartbeatRequest(
        node_id=nodes.nodes[0].id, incarnation="another", resources=nodes.nodes[0].resources
    )

    await stream.write(stranger)
    code, reason, _ = await refusal(stream.read())

    assert (code, reason) == (Code.FAILED_PRECONDITION, "INCARNATION_MISMATCH")
    # The agent's own stream goes on beside it.
    async with asyncio.timeout(20):
        while True:
            found = await server.cluster.GetNode(cluster_pb2.GetNodeRequest(node=nodes.nodes[0].id))
            if found.last_heartbeat_at.seconds:
                break
            await asyncio.sleep(0.05)
