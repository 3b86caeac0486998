"""What is to be done about lost nodes and the instances on them. Pure: values in, actions out.

A node is lost when its lease is gone (OFFLINE). It is *fenced* once ``margin_s`` more has passed: an agent stops what
it has to when its lease has ended, and its guard soon after. From then on instances that ask for it are placed
elsewhere, unless so many nodes were lost together that it looks like a partition: then the loss is *held* until they
come back or an operator says that they are dead.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from hypervisor.core.availability import OnNodeLoss, fences
from hypervisor.core.model import Instance, Node
from hypervisor.core.states import DesiredState, InstanceStatus, NodeStatus

__all__ = [
    "Forget",
    "ForgetCopy",
    "HoldMoves",
    "LossAction",
    "LossLimits",
    "LossSituation",
    "Replace",
    "Start",
    "brake",
    "decide_losses",
    "may_replace",
    "may_start",
    "wants_replacing",
    "why_not",
]

_ENDED = frozenset({InstanceStatus.STOPPED, InstanceStatus.FAILED})
_FENCED = "FENCED"
_NODE_RESTARTED = "NODE_RESTARTED"


@dataclass(frozen=True, slots=True)
class LossLimits:
    """``margin_s``: what a node is given after its lease's end to have stopped what it has to. ``brake_share``: more
    than this share of a zone's or the cluster's nodes lost within ``brake_window_s`` is taken for a partition, where
    there are at least ``brake_nodes``. ``max_moves``: replacements under way at once."""

    margin_s: float = 5.0
    brake_share: float = 0.5
    brake_nodes: int = 3
    brake_window_s: float = 600.0
    max_moves: int = 10


@dataclass(frozen=True, slots=True)
class HoldMoves:
    """Too many were lost with this node: nothing is moved off it by itself."""

    node_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Replace:
    """Place the instance on another node."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Start:
    """Start the instance again where it is."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Forget:
    """It was to be deleted, and its node is dead: nothing is left of it."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class ForgetCopy:
    """A move left something of the instance on a dead node: nothing is left of it."""

    instance: Instance


LossAction = HoldMoves | Replace | Start | Forget | ForgetCopy


@dataclass(frozen=True, slots=True)
class LossSituation:
    """The cluster at one moment. ``fenced``: ids of nodes that have been lost for longer than their leases and the
    margin. ``instances``: those on nodes that are OFFLINE, and those of which a run was ended by a loss."""

    now: datetime
    nodes: Collection[Node]
    fenced: Collection[str]
    instances: Iterable[Instance]
    moving: int
    waits: Callable[[str], bool]
    """Whether the instance was tried lately, and is to be tried again later."""


def decide_losses(situation: LossSituation, limits: LossLimits) -> tuple[LossAction, ...]:
    """Everything that is to be done now."""
    nodes = {node.id: node for node in situation.nodes}
    instances = sorted(situation.instances, key=lambda i: (i.updated_at, i.id))
    held = dict(_held(situation, nodes, instances, limits))
    room = max(limits.max_moves - situation.moving, 0)
    actions: list[LossAction] = [HoldMoves(node_id, why) for node_id, why in held.items()]
    for instance in instances:
        node = nodes.get(instance.node_id)
        if instance.operation_id or node is None:
            continue
        if instance.move is not None:
            other = nodes.get(instance.move.elsewhere[0])
            if other is not None and other.loss is not None and other.loss.evacuated_by:
                actions.append(ForgetCopy(instance))
        if instance.desired is DesiredState.DELETED:
            if node.loss is not None and node.loss.evacuated_by:
                actions.append(Forget(instance.id))
        elif situation.waits(instance.id):
            continue
        elif may_start(instance, node):
            actions.append(Start(instance))
        elif (
            room > 0
            and node.id not in held
            and may_replace(instance, node, fenced=node.id in situation.fenced) is not None
        ):
            actions.append(Replace(instance))
            room -= 1
    return tuple(actions)


def _held(
    situation: LossSituation, nodes: dict[str, Node], instances: Iterable[Instance], limits: LossLimits
) -> Iterator[tuple[str, str]]:
    due = {
        instance.node_id
        for instance in instances
        if instance.node_id in situation.fenced and wants_replacing(instance)
    }
    for node_id in sorted(due):
        loss = nodes[node_id].loss
        if loss is None or loss.held or loss.evacuated_by:
            continue
        why = brake(nodes[node_id], situation.nodes, now=situation.now, limits=limits)
        if why:
            yield node_id, why


def brake(node: Node, nodes: Iterable[Node], *, now: datetime, limits: LossLimits) -> str:
    """Why nothing may be moved off the lost node by itself, as too many others were lost with it; empty if it may.

    Nodes that were lost long ago count neither as lost nor as being there, and so do those known to be dead; losses
    that are held count however old they are.
    """
    oldest = now - timedelta(seconds=limits.brake_window_s)
    counted = [
        other
        for other in nodes
        if other.loss is None
        or (not other.loss.evacuated_by and (other.loss.held or other.loss.since > oldest))
        or other.id == node.id
    ]
    zone = [other for other in counted if (other.region, other.zone) == (node.region, node.zone)]
    for place, those in ((f"zone {node.zone}", zone), ("the cluster", counted)):
        lost = sum(other.loss is not None for other in those)
        if len(those) >= limits.brake_nodes and lost > limits.brake_share * len(those):
            return (
                f"{lost} of {len(those)} nodes of {place} were lost together, which looks like a partition: bring "
                "them back, or say which are dead (`node evacuate`)"
            )
    return ""


def wants_replacing(instance: Instance) -> bool:
    """Whether the instance asks to be made anew elsewhere when its node is lost, and should run."""
    wanted = instance.spec.availability
    return (
        wanted is not None
        and wanted.on_node_loss is OnNodeLoss.RESCHEDULE
        and instance.desired is DesiredState.RUNNING
        and instance.lost is not None
    )


def may_replace(instance: Instance, node: Node, *, fenced: bool) -> str | None:
    """Why the instance may be placed elsewhere now (a sentence), or None if it may not. ``node``: where it is now."""
    if instance.desired is DesiredState.DELETED or instance.operation_id or instance.move is not None:
        return None
    loss = node.loss
    if node.status is NodeStatus.OFFLINE and loss is not None:
        if instance.status is not InstanceStatus.UNKNOWN:
            return None
        if loss.evacuated_by:
            return f"node {node.hostname} is dead, says {loss.evacuated_by}; {_GONE}"
        trusted = fenced and not loss.held and fences(node.fencing, node.disarmed)
        if trusted and wants_replacing(instance):
            return f"node {node.hostname} was lost; {_GONE}"
        return None
    # It was placed anew after a loss, and came to nothing there.
    failed = instance.status is InstanceStatus.FAILED and instance.status_reason in ("REPLACE_FAILED", "LOST")
    if failed and wants_replacing(instance):
        return f"it could not be made on node {node.hostname}: {instance.status_message}"
    return None


_GONE = "its disk and snapshots there are not taken along"


def why_not(node: Node, instance: Instance, *, fenced: bool) -> str:
    """Why an instance that asks for it is not placed elsewhere although its node is lost; empty when it is time."""
    loss = node.loss
    if instance.move is not None:
        return "its old copy is removed first: that is waited for"
    if loss is None or loss.evacuated_by:
        return ""
    if loss.held:
        return loss.held
    if not fences(node.fencing, node.disarmed):
        why = node.disarmed or (node.fencing.reason if node.fencing else "its agent cannot fence")
        return (
            f"node {node.hostname} may still run it, as it does not fence itself ({why}): bring it back, or say "
            "that it is dead (`node evacuate`)"
        )
    return "" if fenced else "its node is given time to stop it"


def may_start(instance: Instance, node: Node) -> bool:
    """Whether the instance, on a node that is heard of, is to be started because a loss ended its run."""
    settled = instance.status in _ENDED and not instance.operation_id
    if not settled or node.status is NodeStatus.OFFLINE or instance.desired is not DesiredState.RUNNING:
        return False
    if instance.status_reason == _FENCED:
        return True
    wanted = instance.spec.availability
    again = wanted is not None and wanted.on_node_loss is not OnNodeLoss.NEVER
    return instance.status_reason == _NODE_RESTARTED and again
