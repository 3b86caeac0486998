"""Many creates at once on one node: each ends RUNNING or is refused with reasons, and the books always balance."""

import concurrent.futures
import uuid

import grpc
from google.rpc import error_details_pb2, status_pb2

from hvtest_programs import ProgramCluster
from hypervisor.v1 import compute_pb2, instance_pb2

CREATES = 100


def error_info(failure: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    for key, value in failure.trailing_metadata():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            info = error_details_pb2.ErrorInfo()
            for detail in status.details:
                if detail.Unpack(info):
                    return info
    raise AssertionError(f"no ErrorInfo: {failure}")


def test_a_hundred_creates_at_once(cluster: ProgramCluster, image: str) -> None:
    memory = int(cluster.node()["resources"]["memory_bytes"])
    # Sized so that 60 to 70 of them fit.
    memory_mb = memory // 65 // (1 << 20)
    fitting = memory // (memory_mb << 20)
    assert 60 <= fitting <= 70

    with cluster.channel() as channel, concurrent.futures.ThreadPoolExecutor(CREATES) as pool:
        compute = cluster.compute(channel)

        def create(number: int) -> grpc.RpcError | None:
            spec = instance_pb2.InstanceSpec(
                image=image, cpu_cores=0.02, memory_mb=memory_mb, command=["sleep", "600"]
            )
            request = compute_pb2.CreateInstanceRequest(
                request_id=str(uuid.uuid4()),
                instance=instance_pb2.Instance(
                    name=f"many-{number}", type=instance_pb2.INSTANCE_TYPE_CONTAINER, spec=spec
                ),
            )
            try:
                compute.CreateInstance(request, timeout=240)
            except grpc.RpcError as failure:
                return failure
            return None

        outcomes = list(pool.map(create, range(CREATES)))

        refusals = [failure for failure in outcomes if failure is not None]
        for failure in refusals:
            assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, failure
            info = error_info(failure)
            assert info.reason == "NO_NODE_FITS"
            assert cluster.hostname in str(dict(info.metadata)) + failure.details()
            assert "memory" in failure.details() + str(dict(info.metadata))
        assert len(refusals) == CREATES - fitting

        listed = compute.ListInstances(compute_pb2.ListInstancesRequest(page_size=1000), timeout=30).instances
        assert len(listed) == fitting
        assert {i.status for i in listed} == {instance_pb2.INSTANCE_STATUS_RUNNING}
        held = cluster.reserved()
        assert held["instances"] == fitting
        assert held["memory_bytes"] == sum(i.spec.memory_mb << 20 for i in listed)
        assert round(held["cpu_cores"] * 1000) == sum(round(i.spec.cpu_cores * 1000) for i in listed)

        def delete(instance_id: str) -> None:
            compute.DeleteInstance(
                compute_pb2.DeleteInstanceRequest(instance=instance_id, force=True), timeout=240
            )

        list(pool.map(delete, [i.id for i in listed]))

    cluster.assert_nothing_left()
