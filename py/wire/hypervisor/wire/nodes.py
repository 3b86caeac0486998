"""Nodes on the wire: record, resources, reservation, drivers."""

from datetime import datetime

from hypervisor.core.model import (
    Allocation,
    Capability,
    DriverInfo,
    InstancesUsage,
    Node,
    NodeResources,
    Taint,
)
from hypervisor.core.resources import Resources, cores, millicores
from hypervisor.v1 import node_pb2
from hypervisor.wire.availability import node_fencing_to_wire
from hypervisor.wire.enums import INSTANCE_TYPE, NODE_ROLE, NODE_STATUS, TAINT_EFFECT
from hypervisor.wire.stats import usage_to_wire
from hypervisor.wire.times import timestamp_of

__all__ = [
    "driver_from_wire",
    "driver_to_wire",
    "node_to_wire",
    "reservation_to_wire",
    "resources_from_wire",
    "resources_to_wire",
    "taint_from_wire",
    "taint_to_wire",
]


def resources_to_wire(resources: NodeResources) -> node_pb2.NodeResources:
    """What a node has and uses."""
    return node_pb2.NodeResources(
        cpu_cores=cores(resources.cpu_millis),
        cpu_used_cores=cores(resources.cpu_used_millis),
        memory_bytes=resources.memory_bytes,
        memory_used=resources.memory_used_bytes,
        disk_bytes=resources.disk_bytes,
        disk_used=resources.disk_used_bytes,
    )


def resources_from_wire(resources: node_pb2.NodeResources) -> NodeResources:
    """What a node has and uses."""
    return NodeResources(
        cpu_millis=millicores(resources.cpu_cores),
        cpu_used_millis=millicores(resources.cpu_used_cores),
        memory_bytes=resources.memory_bytes,
        memory_used_bytes=resources.memory_used,
        disk_bytes=resources.disk_bytes,
        disk_used_bytes=resources.disk_used,
    )


def reservation_to_wire(allocation: Allocation) -> node_pb2.NodeReservation:
    """What placed instances hold."""
    return node_pb2.NodeReservation(
        cpu_cores=cores(allocation.reserved.cpu_millis),
        memory_bytes=allocation.reserved.memory_bytes,
        disk_bytes=allocation.reserved.disk_bytes,
        instances=allocation.instances,
    )


def driver_to_wire(driver: DriverInfo) -> node_pb2.DriverInfo:
    """A driver with its capabilities."""
    return node_pb2.DriverInfo(
        name=driver.name,
        types=[INSTANCE_TYPE.to_wire(kind) for kind in driver.types],
        available=driver.available,
        reason=driver.reason,
        version=driver.version,
        capabilities=[
            node_pb2.Capability(verb=c.verb, supported=c.supported, reason=c.reason)
            for c in driver.capabilities
        ],
    )


def driver_from_wire(driver: node_pb2.DriverInfo) -> DriverInfo:
    """A driver with its capabilities; types this version does not know are left out."""
    kinds = (INSTANCE_TYPE.from_wire(number) for number in driver.types)
    return DriverInfo(
        name=driver.name,
        types=tuple(kind for kind in kinds if kind is not None),
        available=driver.available,
        reason=driver.reason,
        version=driver.version,
        capabilities=tuple(
            Capability(verb=c.verb, supported=c.supported, reason=c.reason) for c in driver.capabilities
        ),
    )


def taint_to_wire(taint: Taint, *, configured: bool = False) -> node_pb2.Taint:
    """A taint."""
    return node_pb2.Taint(
        key=taint.key, value=taint.value, effect=TAINT_EFFECT.to_wire(taint.effect), configured=configured
    )


def taint_from_wire(taint: node_pb2.Taint, field: str) -> Taint:
    """A taint. InvalidArgument naming ``field`` for an unknown effect."""
    effect = TAINT_EFFECT.required(taint.effect, f"{field}.effect")
    return Taint(key=taint.key, value=taint.value, effect=effect)


def node_to_wire(
    node: Node,
    *,
    resource_version: int,
    allocation: Allocation,
    resources: NodeResources | None = None,
    usage: InstancesUsage | None = None,
    last_heartbeat_at: datetime | None = None,
    allocatable: Resources | None = None,
    health: node_pb2.PlacementHealth | None = None,
    drain: node_pb2.NodeDrain | None = None,
) -> node_pb2.Node:
    """The record as users see it. Without ``resources`` only the node's capacity is known."""
    amount = node.capacity if allocatable is None else allocatable
    if resources is None:
        resources = NodeResources(
            cpu_millis=node.capacity.cpu_millis,
            memory_bytes=node.capacity.memory_bytes,
            disk_bytes=node.capacity.disk_bytes,
        )
    return node_pb2.Node(
        id=node.id,
        hostname=node.hostname,
        address=node.address,
        port=node.port,
        region=node.region,
        zone=node.zone,
        role=NODE_ROLE.to_wire(node.role),
        status=NODE_STATUS.to_wire(node.status),
        resources=resources_to_wire(resources),
        usage=None if usage is None else usage_to_wire(usage),
        labels=node.labels,
        created_at=timestamp_of(node.created_at),
        updated_at=timestamp_of(node.updated_at),
        reservation=reservation_to_wire(allocation),
        drivers=[driver_to_wire(driver) for driver in node.drivers],
        schedulable=node.schedulable,
        status_message=node.cordon_reason or node.status_message,
        last_heartbeat_at=timestamp_of(last_heartbeat_at),
        agent_version=node.agent_version,
        resource_version=resource_version,
        simulated=node.simulated,
        taints=[taint_to_wire(t, configured=t not in node.set_taints) for t in node.taints],
        allocatable=node_pb2.NodeAllocatable(
            cpu_cores=cores(amount.cpu_millis), memory_bytes=amount.memory_bytes, disk_bytes=amount.disk_bytes
        ),
        placement_health=health,
        drain=drain,
        fencing=node_fencing_to_wire(node),
    )
