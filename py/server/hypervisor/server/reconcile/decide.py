"""What the leader has to do, given the cluster as it is. Pure: values in, actions out.

Actions may be repeated or outdated; the commits that carry them out look again (and are fenced).
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from hypervisor.core.images import Image, ImageState
from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.core.states import TRANSITIONAL, DesiredState, InstanceStatus, NodeStatus
from hypervisor.server.node_changes import loses_sight
from hypervisor.server.verbs import LED

__all__ = [
    "Action",
    "FinishImageDelete",
    "InspectNode",
    "MarkNodeOffline",
    "MarkUnknown",
    "PurgeOperation",
    "RedriveOperation",
    "RemoveLeftover",
    "RemoveOldCopy",
    "Situation",
    "decide",
]


@dataclass(frozen=True, slots=True)
class MarkNodeOffline:
    """Its lease is gone."""

    node_id: str


@dataclass(frozen=True, slots=True)
class MarkUnknown:
    """Its node is offline."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class RedriveOperation:
    """Its server is dead, or it is long past its deadline."""

    operation_id: str


@dataclass(frozen=True, slots=True)
class RemoveLeftover:
    """It shall be gone, no operation removes it, and its node is there."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class RemoveOldCopy:
    """Its move is over, and what that left on a node which is there has not been removed."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class InspectNode:
    """Something on it is not known, and it can be asked."""

    node_id: str


@dataclass(frozen=True, slots=True)
class PurgeOperation:
    """It ended longer ago than operations are kept."""

    operation_id: str


@dataclass(frozen=True, slots=True)
class FinishImageDelete:
    """It is being deleted, and its server is dead or takes too long."""

    image_id: str


Action = (
    MarkNodeOffline
    | MarkUnknown
    | RedriveOperation
    | RemoveLeftover
    | RemoveOldCopy
    | InspectNode
    | PurgeOperation
    | FinishImageDelete
)


@dataclass(frozen=True, slots=True)
class Situation:
    """The cluster at one moment. ``nodes_alive`` and ``servers_alive`` are those whose leases exist."""

    now: datetime
    nodes: Iterable[Node]
    nodes_alive: Collection[str]
    instances: Iterable[Instance]
    operations: Iterable[OperationRecord]
    servers_alive: Collection[str]
    retention: timedelta
    patience: timedelta
    """How long after an operation's deadline its server is left to end it by itself."""
    images: Iterable[Image] = ()
    """Those that are being deleted, at least."""


def decide(situation: Situation) -> tuple[Action, ...]:
    """Everything that is to be done now, nodes first."""
    nodes = {node.id: node for node in situation.nodes}
    instances = {instance.id: instance for instance in situation.instances}
    return (
        *_nodes(nodes.values(), situation.nodes_alive),
        *_instances(instances.values(), nodes),
        *_operations(situation, instances),
        *_images(situation),
    )


def _nodes(nodes: Iterable[Node], alive: Collection[str]) -> Iterator[Action]:
    for node in nodes:
        if node.status is not NodeStatus.OFFLINE and node.id not in alive:
            yield MarkNodeOffline(node.id)


def _instances(instances: Iterable[Instance], nodes: dict[str, Node]) -> Iterator[Action]:
    to_inspect: dict[str, None] = {}
    for instance in instances:
        node = nodes.get(instance.node_id)
        if instance.operation_id or node is None:
            continue
        offline = node.status is NodeStatus.OFFLINE
        if instance.move is not None and instance.desired is not DesiredState.DELETED:
            other = nodes.get(instance.move.elsewhere[0])
            if other is not None and other.status is not NodeStatus.OFFLINE:
                yield RemoveOldCopy(instance.id)
        if instance.desired is DesiredState.DELETED:
            if not offline:
                yield RemoveLeftover(instance.id)
        elif offline:
            if loses_sight(instance):
                yield MarkUnknown(instance.id)
        elif instance.status is InstanceStatus.UNKNOWN or instance.status in TRANSITIONAL:
            to_inspect[node.id] = None
    for node_id in to_inspect:
        yield InspectNode(node_id)


def _operations(situation: Situation, instances: dict[str, Instance]) -> Iterator[Action]:
    oldest_kept = situation.now - situation.retention
    for operation in situation.operations:
        if operation.done:
            if operation.finished_at is not None and operation.finished_at < oldest_kept:
                yield PurgeOperation(operation.id)
            continue
        if operation.verb in LED:
            continue
        instance = instances.get(operation.object_id)
        deadline = instance.transition_deadline if instance is not None else None
        overdue = deadline is not None and deadline + situation.patience < situation.now
        if overdue or operation.server_id not in situation.servers_alive:
            yield RedriveOperation(operation.id)


def _images(situation: Situation) -> Iterator[Action]:
    for image in situation.images:
        if image.state is not ImageState.DELETING:
            continue
        # One that an earlier version began tells of no server.
        operation = None if image.deletion is None else image.deletion.operation
        if (
            operation is None
            or operation.server_id not in situation.servers_alive
            or operation.started_at + situation.patience < situation.now
        ):
            yield FinishImageDelete(image.id)
