"""Bad input through the built programs: code, reason, a sentence that names the field, and nothing half-made."""

import uuid
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from hvtest_programs import ProgramCluster
from hypervisor.v1 import compute_pb2, compute_pb2_grpc, instance_pb2

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def compute(cluster: ProgramCluster) -> Iterator[compute_pb2_grpc.ComputeServiceStub]:
    options = [("grpc.max_send_message_length", 32 << 20)]
    with grpc.insecure_channel(cluster.address, options=options) as channel:
        yield compute_pb2_grpc.ComputeServiceStub(channel)


def draft(image: str, **changes: object) -> instance_pb2.Instance:
    spec = {"image": image, "cpu_cores": 0.05, "memory_mb": 16, "command": ["sleep", "600"]}
    spec |= {k.removeprefix("spec_"): v for k, v in changes.items() if k.startswith("spec_")}
    top = {"name": "bad", "type": instance_pb2.INSTANCE_TYPE_CONTAINER}
    top |= {k: v for k, v in changes.items() if not k.startswith("spec_")}
    return instance_pb2.Instance(spec=instance_pb2.InstanceSpec(**spec), **top)


def refused(call: grpc.UnaryUnaryMultiCallable, request: object) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and sentence of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=30)
    failure = caught.value
    for key, value in failure.trailing_metadata():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return failure.code(), info.reason, failure.details()
    raise AssertionError(f"no ErrorInfo in {failure!r}")


CASES = [
    ("empty name", {"name": ""}, Code.INVALID_ARGUMENT, "name"),
    ("name of 10 MB", {"name": "a" * 10_000_000}, Code.INVALID_ARGUMENT, "name"),
    ("upper case", {"name": "Web"}, Code.INVALID_ARGUMENT, "name"),
    ("no type", {"type": 0}, Code.INVALID_ARGUMENT, "type"),
    ("unknown type", {"type": 77}, Code.INVALID_ARGUMENT, "type"),
    ("no processors", {"spec_cpu_cores": 0.0}, Code.INVALID_ARGUMENT, "cpu_cores"),
    ("no memory", {"spec_memory_mb": 0}, Code.INVALID_ARGUMENT, "memory_mb"),
    ("negative processors", {"spec_cpu_cores": -1.0}, Code.INVALID_ARGUMENT, "cpu_cores"),
    ("huge processors", {"spec_cpu_cores": 1e12}, Code.INVALID_ARGUMENT, "cpu_cores"),
    ("not a number", {"spec_cpu_cores": float("nan")}, Code.INVALID_ARGUMENT, "cpu_cores"),
    ("negative memory", {"spec_memory_mb": -5}, Code.INVALID_ARGUMENT, "memory_mb"),
    ("huge memory", {"spec_memory_mb": 1 << 60}, Code.INVALID_ARGUMENT, "memory_mb"),
    ("huge disk", {"spec_disk_gb": 1 << 60}, Code.INVALID_ARGUMENT, "disk_gb"),
    ("kernel for a container", {"spec_kernel_path": "/boot/vmlinuz"}, Code.INVALID_ARGUMENT, "kernel_path"),
    ("no image", {"spec_image": ""}, Code.INVALID_ARGUMENT, "image"),
    (
        "unknown image",
        {"spec_image": "docker.io/library/nothing:1"},
        Code.NOT_FOUND,
        "docker.io/library/nothing:1",
    ),
    (
        "archive outside the roots",
        {"spec_image": "oci-archive:/etc/passwd"},
        Code.INVALID_ARGUMENT,
        "/etc/passwd",
    ),
    ("missing node", {"spec_node": "nowhere"}, Code.NOT_FOUND, "nowhere"),
    ("other project", {"project": "mars"}, Code.NOT_FOUND, "mars"),
    ("more than any node has", {"spec_memory_mb": 16_000_000}, Code.RESOURCE_EXHAUSTED, "memory"),
]


@pytest.mark.parametrize(("changes", "code", "named"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_bad_create_is_refused_and_leaves_nothing(
    cluster: ProgramCluster,
    compute: compute_pb2_grpc.ComputeServiceStub,
    image: str,
    changes: dict[str, object],
    code: grpc.StatusCode,
    named: str,
) -> None:
    got, reason, sentence = refused(
        compute.CreateInstance, compute_pb2.CreateInstanceRequest(instance=draft(image, **changes))
    )

    assert got is code, sentence
    assert reason
    assert named in sentence
    assert len(sentence) < 4000
    assert cluster.reserved() == {"cpu_cores": 0.0, "memory_bytes": 0, "instances": 0}
    assert cluster.containerd.leftovers() == {}


def test_every_wrong_field_is_named_at_once(compute: compute_pb2_grpc.ComputeServiceStub, image: str) -> None:
    wrong = draft(image, name="", spec_cpu_cores=-1.0, spec_memory_mb=-1)

    code, _, sentence = refused(compute.CreateInstance, compute_pb2.CreateInstanceRequest(instance=wrong))

    assert code is Code.INVALID_ARGUMENT
    assert all(field in sentence for field in ("name", "cpu_cores", "memory_mb"))


def test_an_unknown_node_label_is_named_with_those_known(
    compute: compute_pb2_grpc.ComputeServiceStub, image: str
) -> None:
    wanting = draft(image)
    wanting.spec.node_selector.add(key="gpu", values=["a100"])

    code, reason, sentence = refused(
        compute.CreateInstance, compute_pb2.CreateInstanceRequest(instance=wanting)
    )

    assert (code, reason) == (Code.FAILED_PRECONDITION, "UNKNOWN_NODE_LABEL")
    assert "gpu" in sentence
    assert "hypervisor/hostname" in sentence


def test_types_without_a_driver_say_why(compute: compute_pb2_grpc.ComputeServiceStub) -> None:
    vm = instance_pb2.Instance(
        name="vm",
        type=instance_pb2.INSTANCE_TYPE_VM,
        spec=instance_pb2.InstanceSpec(image="disk.qcow2", cpu_cores=0.1, memory_mb=64),
    )

    code, reason, sentence = refused(compute.CreateInstance, compute_pb2.CreateInstanceRequest(instance=vm))

    assert (code, reason) == (Code.RESOURCE_EXHAUSTED, "NO_NODE_FITS")
    assert "libvirt" in sentence


def test_repeats_names_and_states(
    cluster: ProgramCluster, compute: compute_pb2_grpc.ComputeServiceStub, image: str
) -> None:
    request = compute_pb2.CreateInstanceRequest(
        request_id=str(uuid.uuid4()), instance=draft(image, name="one")
    )
    first = compute.CreateInstance(request, timeout=60)
    again = compute.CreateInstance(request, timeout=60)
    assert again.id == first.id
    assert again.instance.id == first.instance.id

    request.instance.spec.memory_mb = 17
    assert refused(compute.CreateInstance, request)[:2] == (Code.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    taken = compute_pb2.CreateInstanceRequest(instance=draft(image, name="one"))
    assert refused(compute.CreateInstance, taken)[:2] == (Code.ALREADY_EXISTS, "INSTANCE_NAME_TAKEN")
    start = compute_pb2.StartInstanceRequest(instance="one")
    assert refused(compute.StartInstance, start)[:2] == (Code.FAILED_PRECONDITION, "ALREADY_RUNNING")
    timid = compute_pb2.DeleteInstanceRequest(instance="one")
    assert refused(compute.DeleteInstance, timid)[:2] == (Code.FAILED_PRECONDITION, "INSTANCE_RUNNING")
    old = compute_pb2.StopInstanceRequest(instance="one", resource_version=1)
    assert refused(compute.StopInstance, old)[:2] == (Code.ABORTED, "RESOURCE_VERSION_MISMATCH")

    stop = compute_pb2.StopInstanceRequest(instance="one")
    stop.stop.force = True
    compute.StopInstance(stop, timeout=60)
    assert refused(compute.StopInstance, stop)[:2] == (Code.FAILED_PRECONDITION, "NOT_RUNNING")
    stats = compute_pb2.GetInstanceStatsRequest(instance="one")
    assert refused(compute.GetInstanceStats, stats)[:2] == (Code.FAILED_PRECONDITION, "NOT_RUNNING")
    compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance="one"), timeout=60)
    missing = compute_pb2.GetInstanceRequest(instance="one")
    assert refused(compute.GetInstance, missing)[:2] == (Code.NOT_FOUND, "INSTANCE_NOT_FOUND")
    cluster.assert_nothing_left()


def test_the_command_line_says_what_to_do_and_exits_as_documented(
    cluster: ProgramCluster, image: str
) -> None:
    usage = cluster.ctl("instance", "create", "x", "--type", "balloon")
    missing = cluster.ctl("instance", "get", "nobody")
    invalid = cluster.ctl("instance", "create", "Bad_Name", "--image", image)
    refusal = cluster.ctl("instance", "create", "big", "--image", image, "--memory", "10000GiB")

    assert usage.code == 2
    assert "container" in usage.err
    assert missing.code == 3
    assert "nobody" in missing.err
    assert invalid.code in (1, 2)
    assert "name" in invalid.err
    assert refusal.code == 4
    assert cluster.hostname in refusal.err
    assert "memory" in refusal.err


def test_reflection_and_health_are_on(cluster: ProgramCluster) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(cluster.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)

    assert {
        "hypervisor.v1.ClusterService",
        "hypervisor.v1.ComputeService",
        "hypervisor.v1.OperationService",
    } <= set(services)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
