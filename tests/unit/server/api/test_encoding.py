from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from hvtest_seed import seeded_instance
from hypervisor.core.model import InstanceStats
from hypervisor.server.api.encoding import InstanceBytes, encoded_event, encoded_list
from hypervisor.server.services import Versioned
from hypervisor.v1 import cluster_pb2, compute_pb2, instance_pb2
from hypervisor.wire.instances import instance_to_wire

INSTANCE = seeded_instance(7)
SAMPLE = InstanceStats(sampled_at=datetime(2026, 1, 1, tzinfo=UTC), pids=3)


def test_encoded_instances_are_what_the_conversion_makes() -> None:
    made = InstanceBytes()

    plain = instance_pb2.Instance.FromString(made.get(Versioned(INSTANCE, 5), None))
    sampled = instance_pb2.Instance.FromString(made.get(Versioned(INSTANCE, 5), SAMPLE))

    assert plain == instance_to_wire(INSTANCE, resource_version=5)
    assert sampled == instance_to_wire(INSTANCE, resource_version=5, stats=SAMPLE)


def test_a_changed_record_or_sample_is_shown_at_once() -> None:
    made = InstanceBytes()
    made.get(Versioned(INSTANCE, 5), SAMPLE)

    newer = structs.replace(INSTANCE, node_id="elsewhere")
    later = structs.replace(SAMPLE, pids=4)
    shown = instance_pb2.Instance.FromString(made.get(Versioned(newer, 6), later))

    assert (shown.node_id, shown.resource_version, shown.stats.pids) == ("elsewhere", 6, 4)


def test_memory_is_bounded() -> None:
    made = InstanceBytes(limit=10)

    for number in range(100):
        made.get(Versioned(seeded_instance(number), 1), SAMPLE)

    assert len(made._records) == 10
    assert len(made._samples) <= 10


@given(st.lists(st.text(max_size=300), max_size=5), st.text(max_size=10))
def test_a_list_put_together_from_bytes_is_the_list(names: list[str], token: str) -> None:
    instances = [instance_pb2.Instance(name=name) for name in names]
    rest = compute_pb2.ListInstancesResponse(next_page_token=token, revision=9, stale=True)

    data = encoded_list([i.SerializeToString() for i in instances], rest)

    expected = compute_pb2.ListInstancesResponse(
        instances=instances, next_page_token=token, revision=9, stale=True
    )
    assert compute_pb2.ListInstancesResponse.FromString(data) == expected


def test_an_event_put_together_from_bytes_is_the_event() -> None:
    instance = instance_to_wire(INSTANCE, resource_version=5)
    rest = cluster_pb2.Event(revision=5, kind="instance", type=cluster_pb2.Event.TYPE_CREATED)

    shown = cluster_pb2.Event.FromString(encoded_event(instance.SerializeToString(), rest))

    assert shown.instance == instance
    assert (shown.revision, shown.kind) == (5, "instance")
