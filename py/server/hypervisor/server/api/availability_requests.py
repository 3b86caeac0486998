"""What requests say of losses and fencing, checked. Pure; every wrong field is reported at once."""

from hypervisor.core.availability import OnNodeLoss, OnPartition
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import ON_NODE_LOSS, ON_PARTITION

__all__ = ["check_availability"]


def check_availability(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    """Note unknown values, and the pair that could run an instance twice."""
    asked = spec.availability
    lost, cut_off = ON_NODE_LOSS.from_wire(asked.on_node_loss), ON_PARTITION.from_wire(asked.on_partition)
    if asked.on_node_loss != 0 and lost is None:
        wrong.add(f"{at}availability.on_node_loss", "is not known: use NEVER, RESCHEDULE or RESTART_IN_PLACE")
    if asked.on_partition != 0 and cut_off is None:
        wrong.add(f"{at}availability.on_partition", "is not known: use STAY or STOP")
    if lost is OnNodeLoss.RESCHEDULE and cut_off is OnPartition.STAY:
        wrong.add(
            f"{at}availability.on_partition",
            "is STAY, so that with on_node_loss RESCHEDULE it could run twice: use STOP, or leave it out",
        )
