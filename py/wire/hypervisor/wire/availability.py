"""Availability, losses and fencing on the wire."""

from hypervisor.core.availability import (
    Availability,
    InstanceLoss,
    NodeFencing,
    OnNodeLoss,
    OnPartition,
)
from hypervisor.core.model import Node
from hypervisor.v1 import instance_pb2, node_pb2
from hypervisor.wire.enums import FENCING_STATE, ON_NODE_LOSS, ON_PARTITION
from hypervisor.wire.times import timestamp_of

__all__ = [
    "availability_from_wire",
    "availability_to_wire",
    "fencing_from_wire",
    "fencing_to_wire",
    "loss_to_wire",
    "node_fencing_to_wire",
]


def availability_to_wire(availability: Availability | None) -> instance_pb2.Availability | None:
    """What an instance wants; None stays None."""
    if availability is None:
        return None
    return instance_pb2.Availability(
        on_node_loss=ON_NODE_LOSS.to_wire(availability.on_node_loss),
        on_partition=ON_PARTITION.to_wire(availability.on_partition),
    )


def availability_from_wire(spec: instance_pb2.InstanceSpec) -> Availability | None:
    """Of a specification, with the defaults of instance.proto; None where it has none."""
    if not spec.HasField("availability"):
        return None
    on_node_loss = ON_NODE_LOSS.from_wire(spec.availability.on_node_loss) or OnNodeLoss.NEVER
    default = OnPartition.STOP if on_node_loss is OnNodeLoss.RESCHEDULE else OnPartition.STAY
    return Availability(
        on_node_loss=on_node_loss,
        on_partition=ON_PARTITION.from_wire(spec.availability.on_partition) or default,
    )


def loss_to_wire(loss: InstanceLoss | None) -> instance_pb2.InstanceLoss | None:
    """What was lost; None stays None."""
    if loss is None:
        return None
    return instance_pb2.InstanceLoss(
        since=timestamp_of(loss.since), node_id=loss.node_id, waiting=loss.waiting
    )


def fencing_to_wire(fencing: NodeFencing | None) -> node_pb2.NodeFencing | None:
    """What an agent tells; None stays None."""
    if fencing is None:
        return None
    return node_pb2.NodeFencing(state=FENCING_STATE.to_wire(fencing.state), reason=fencing.reason)


def fencing_from_wire(fencing: node_pb2.NodeFencing) -> NodeFencing | None:
    """What an agent told; None for one that cannot fence."""
    state = FENCING_STATE.from_wire(fencing.state)
    return None if state is None else NodeFencing(state=state, reason=fencing.reason)


def node_fencing_to_wire(node: Node) -> node_pb2.NodeFencing:
    """How a node is fenced, and what was decided about a lost one."""
    told, loss = node.fencing, node.loss
    message = node_pb2.NodeFencing(
        state=FENCING_STATE.to_wire(None if told is None else told.state),
        reason=node.disarmed or ("" if told is None else told.reason),
        disarm_requested=bool(node.disarmed),
    )
    if loss is not None:
        message.offline_since.FromDatetime(loss.since)
        message.moves_held, message.evacuated_by = loss.held, loss.evacuated_by
    return message
