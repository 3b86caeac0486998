from collections.abc import Callable

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.ids import new_id
from hypervisor.core.states import NodeRole
from hypervisor.server.api.node_requests import checked_usage, registration_of, samples_of
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import cluster_pb2, instance_pb2, node_pb2

Change = Callable[[cluster_pb2.RegisterNodeRequest], object]


def good() -> cluster_pb2.RegisterNodeRequest:
    return cluster_pb2.RegisterNodeRequest(
        node=node_pb2.Node(
            id=new_id("n"),
            hostname="node-1",
            address="10.0.0.1",
            port=50052,
            resources=node_pb2.NodeResources(cpu_cores=4, memory_bytes=1 << 30),
            drivers=[
                node_pb2.DriverInfo(name="fake", types=[instance_pb2.INSTANCE_TYPE_CONTAINER], available=True)
            ],
        ),
        incarnation="1",
    )


def node(**fields: object) -> Change:
    return lambda r: r.node.MergeFrom(node_pb2.Node(**fields))  # type: ignore[arg-type]


def resources(**fields: object) -> Change:
    return node(resources=node_pb2.NodeResources(**fields))  # type: ignore[arg-type]


def test_a_registration_gets_the_documented_defaults() -> None:
    registration = registration_of(good())

    assert (registration.region, registration.zone, registration.role) == (
        "default",
        "default",
        NodeRole.WORKER,
    )
    assert registration.resources.cpu_millis == 4000
    assert [driver.name for driver in registration.drivers] == ["fake"]


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        (node(id="n-1"), "node.id", "is not the id of a node"),
        (node(hostname="a b"), "node.hostname", "is not a legal host name"),
        (lambda r: r.node.ClearField("address"), "node.address", "is required"),
        (lambda r: r.node.ClearField("port"), "node.port", "is 0: use 1 to 65535"),
        (node(port=70000), "node.port", "is 70000: use 1 to 65535"),
        (node(region="eu 1"), "node.region", "value 'eu 1' is not legal"),
        (node(role=9), "node.role", "is not known"),
        (node(labels={"hypervisor/zone": "x"}), "node.labels", "are set by the server"),
        (node(status=node_pb2.NODE_STATUS_READY), "node.status", "is set by the server"),
        (resources(cpu_cores=float("nan")), "node.resources.cpu_cores", "is nan"),
        (resources(cpu_used_cores=-1.0), "node.resources.cpu_used_cores", "is -1"),
        (resources(memory_bytes=-1), "node.resources.memory_bytes", "is -1"),
        (node(drivers=[node_pb2.DriverInfo(name="fake")]), "node.drivers", "each needs a name of its own"),
        (lambda r: r.ClearField("incarnation"), "incarnation", "must be 1 to 128 characters"),
        (lambda r: r.instances.add(), "instances", "each needs instance_id and observed_at"),
        (
            lambda r: r.instances.add(instance_id="i", observed_at=Timestamp(seconds=1 << 50)),
            "instances[0]",
            "beyond the year 9999",
        ),
    ],
)
def test_a_wrong_registration_is_refused_by_field(change: Change, field: str, sentence: str) -> None:
    request = good()
    change(request)

    with pytest.raises(InvalidArgument) as refused:
        registration_of(request)

    assert refused.value.violations[0].field == field
    assert sentence in refused.value.violations[0].description


def test_an_empty_registration_names_everything_that_is_missing() -> None:
    with pytest.raises(InvalidArgument) as refused:
        registration_of(cluster_pb2.RegisterNodeRequest())

    assert {v.field for v in refused.value.violations} == {
        "node.id",
        "node.hostname",
        "node.address",
        "node.port",
        "incarnation",
        "node.resources",
    }


def test_samples_without_a_time_are_refused() -> None:
    wrong = Violations()
    samples_of(wrong, {"i": instance_pb2.InstanceStats(pids=1)})

    with pytest.raises(InvalidArgument, match=r"stats\.sampled_at"):
        wrong.check()


def test_more_samples_than_a_heartbeat_carries_are_refused() -> None:
    wrong = Violations()
    sample = instance_pb2.InstanceStats(pids=1)
    sample.sampled_at.seconds = 1
    samples_of(wrong, {f"i-{n}": sample for n in range(2001)})

    with pytest.raises(InvalidArgument, match="has 2001 samples: send at most 2000"):
        wrong.check()


@pytest.mark.parametrize(
    ("usage", "field"),
    [
        (node_pb2.InstancesUsage(running=-1), r"usage\.running"),
        (node_pb2.InstancesUsage(running=1, cpu_used_cores=float("nan")), r"usage\.cpu_used_cores"),
        (node_pb2.InstancesUsage(memory_used_bytes=-5), r"usage\.memory_used_bytes"),
    ],
)
def test_use_that_cannot_be_is_refused(usage: node_pb2.InstancesUsage, field: str) -> None:
    wrong = Violations()
    checked_usage(wrong, "usage", usage)

    with pytest.raises(InvalidArgument, match=field):
        wrong.check()
