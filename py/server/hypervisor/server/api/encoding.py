"""Answers as bytes: an instance is encoded once for each revision of its record, however often it is read.

Protobuf messages concatenate: the bytes of two messages of one type, one after the other, are their merge. So the
record's part is kept encoded, and what changes without it (the newest sample) is put behind; and a list is its items,
each behind its tag and length.
"""

from collections.abc import Iterable
from datetime import timedelta
from functools import lru_cache

from google.protobuf.message import Message

from hypervisor.core.clock import Clock
from hypervisor.core.model import Instance, InstanceStats, Node, OperationRecord
from hypervisor.server.services import ClusterView, Instances, Kind, Nodes, Versioned
from hypervisor.v1 import cluster_pb2, compute_pb2, instance_pb2, node_pb2, operation_pb2, placement_pb2
from hypervisor.wire.instances import instance_to_wire
from hypervisor.wire.nodes import node_to_wire
from hypervisor.wire.operations import operation_to_wire
from hypervisor.wire.stats import stats_to_wire
from hypervisor.wire.times import timestamp_of

__all__ = ["Encoder", "InstanceBytes", "encoded_event", "encoded_list"]

_LENGTH_DELIMITED = 2


@lru_cache(maxsize=4096)
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(message: type[Message], field: str) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | _LENGTH_DELIMITED)


_INSTANCES_TAG = _tag(compute_pb2.ListInstancesResponse, "instances")
_EVENT_INSTANCE_TAG = _tag(cluster_pb2.Event, "instance")


def encoded_list(items: Iterable[bytes], rest: compute_pb2.ListInstancesResponse) -> bytes:
    """A ListInstancesResponse of encoded instances; ``rest`` has its other fields."""
    parts: list[bytes] = []
    for item in items:
        parts += (_INSTANCES_TAG, _varint(len(item)), item)
    parts.append(rest.SerializeToString())
    return b"".join(parts)


def encoded_event(instance: bytes, rest: cluster_pb2.Event) -> bytes:
    """An Event about an encoded instance; ``rest`` has its other fields."""
    return b"".join((rest.SerializeToString(), _EVENT_INSTANCE_TAG, _varint(len(instance)), instance))


class InstanceBytes:
    """Encoded instances. Keeps at most ``limit`` records, the oldest made goes first."""

    def __init__(self, *, limit: int = 50_000) -> None:
        self._limit = limit
        self._records: dict[str, tuple[int, bytes]] = {}
        self._samples: dict[str, tuple[InstanceStats, bytes]] = {}

    def get(self, found: Versioned[Instance], sample: InstanceStats | None) -> bytes:
        """The instance as users see it, with its newest sample."""
        instance_id = found.value.id
        kept = self._records.get(instance_id)
        if kept is None or kept[0] != found.revision:
            data = instance_to_wire(found.value, resource_version=found.revision).SerializeToString()
            kept = self._records[instance_id] = (found.revision, data)
            if len(self._records) > self._limit:
                oldest = next(iter(self._records))
                del self._records[oldest]
                self._samples.pop(oldest, None)
        if sample is None:
            return kept[1]
        known = self._samples.get(instance_id)
        if known is None or known[0] is not sample:
            data = instance_pb2.Instance(stats=stats_to_wire(sample)).SerializeToString()
            known = self._samples[instance_id] = (sample, data)
        return kept[1] + known[1]


class Encoder:
    """Records of the view as messages, with what stands beside them (samples, reservations, measured use)."""

    def __init__(self, view: ClusterView, instances: Instances, nodes: Nodes, clock: Clock) -> None:
        self._view = view
        self._instances = instances
        self._nodes = nodes
        self._clock = clock
        self._bytes = InstanceBytes()

    def list_version(self) -> tuple[int, int]:
        """The same as long as lists are: the revision; and the second, as a view that repairs itself keeps its own."""
        return self._view.revision, int(self._clock.monotonic())

    def instance_bytes(self, found: Versioned[Instance]) -> bytes:
        """An encoded Instance."""
        return self._bytes.get(found, self._instances.last_stats(found.value.id))

    def instance(self, found: Versioned[Instance]) -> instance_pb2.Instance:
        """An Instance."""
        sample = self._instances.last_stats(found.value.id)
        return instance_to_wire(found.value, resource_version=found.revision, stats=sample)

    def node(self, found: Versioned[Node]) -> node_pb2.Node:
        """A Node with its reservation and the newest use this server knows."""
        usage = self._nodes.usage(found.value.id)
        heard_at = None if usage is None else self._clock.now() - timedelta(seconds=usage.age_s)
        return node_to_wire(
            found.value,
            resource_version=found.revision,
            allocation=self._view.allocation(found.value.id),
            resources=None if usage is None else usage.resources,
            usage=None if usage is None else usage.instances,
            last_heartbeat_at=heard_at,
            allocatable=self._nodes.allocatable(found.value),
            health=self._health(found.value.id),
            drain=self._drain(found.value.id),
        )

    def _health(self, node_id: str) -> node_pb2.PlacementHealth | None:
        known = self._nodes.placements(node_id)
        if known is None:
            return None
        return node_pb2.PlacementHealth(
            penalty=known.penalty,
            failures=known.failures,
            last_failure_at=timestamp_of(known.last_failure_at),
            last_failure=known.last_failure,
        )

    def _drain(self, node_id: str) -> node_pb2.NodeDrain | None:
        known = self._view.drain(node_id)
        if known is None:
            return None
        drain = known.value
        return node_pb2.NodeDrain(
            kind=drain.kind.value,
            active=drain.active,
            operation_id=drain.operation_id,
            started_at=timestamp_of(drain.started_at),
            finished_at=timestamp_of(drain.finished_at),
            message=drain.message,
            instances_total=drain.total,
        )

    def operation(self, found: Versioned[OperationRecord], *, bare: bool = False) -> operation_pb2.Operation:
        """An Operation, with the object it is about unless ``bare``."""
        record = found.value
        instance = node = None
        if not bare and record.object_kind == Kind.INSTANCE:
            about = self._view.instance(record.object_id)
            instance = None if about is None else self.instance(about)
        elif not bare and record.object_kind == Kind.NODE:
            known = self._view.node(record.object_id)
            node = None if known is None else self.node(known)
        return operation_to_wire(record, resource_version=found.revision, instance=instance, node=node)

    def planned(
        self,
        instance: Instance,
        request_id: str,
        principal: str,
        explanation: placement_pb2.PlacementExplanation,
    ) -> operation_pb2.Operation:
        """The answer to ``validate_only``: done, with the instance as it would be, and nothing recorded."""
        now = timestamp_of(self._clock.now())
        return operation_pb2.Operation(
            verb="create",
            object_kind=Kind.INSTANCE,
            object_name=instance.name,
            project=instance.project,
            principal=principal,
            request_id=request_id,
            state=operation_pb2.OPERATION_STATE_SUCCEEDED,
            done=True,
            progress_percent=100,
            progress_message="validated only: nothing was recorded",
            started_at=now,
            finished_at=now,
            instance=instance_to_wire(instance, resource_version=0),
            explanation=explanation,
        )
