"""What happens to instances when their node, or the way to it, is lost; and how nodes fence themselves."""

from datetime import datetime
from enum import StrEnum

import msgspec

__all__ = [
    "Availability",
    "FencingState",
    "InstanceLoss",
    "NodeFencing",
    "NodeLoss",
    "OnNodeLoss",
    "OnPartition",
    "fences",
]


class OnNodeLoss(StrEnum):
    """What becomes of an instance whose node is lost; see OnNodeLoss in instance.proto."""

    NEVER = "never"
    RESCHEDULE = "reschedule"
    RESTART_IN_PLACE = "restart_in_place"


class OnPartition(StrEnum):
    """What an instance does when its node hears from no server; see OnPartition in instance.proto."""

    STAY = "stay"
    STOP = "stop"


class FencingState(StrEnum):
    """Whether a node fences itself; see FencingState in node.proto."""

    ARMED = "armed"
    FENCING = "fencing"
    FENCED = "fenced"
    DISARMED = "disarmed"


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance wants; see Availability in instance.proto."""

    on_node_loss: OnNodeLoss = OnNodeLoss.NEVER
    on_partition: OnPartition = OnPartition.STAY

    @property
    def stops(self) -> bool:
        """Whether its node has to stop it when no server hears from the node."""
        return self.on_partition is OnPartition.STOP or self.on_node_loss is OnNodeLoss.RESCHEDULE


class InstanceLoss(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Its node was lost while it should run; see InstanceLoss in instance.proto."""

    since: datetime
    node_id: str
    waiting: str = ""


class NodeFencing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As the agent tells it."""

    state: FencingState
    reason: str = ""


class NodeLoss(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node that is OFFLINE: since when, and what was decided about it.

    ``held``: why nothing is moved off it by itself. ``evacuated_by``: who said that it is dead.
    """

    since: datetime
    held: str = ""
    evacuated_by: str = ""


def fences(fencing: NodeFencing | None, disarmed: str) -> bool:
    """Whether a node can be trusted to have stopped what it has to, once its time is over.

    ``disarmed``: why an operator has switched it off; empty where nobody has.
    """
    return fencing is not None and fencing.state is not FencingState.DISARMED and not disarmed
