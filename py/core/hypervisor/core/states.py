"""The states of instances and nodes, and the one table of legal moves between instance states."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

__all__ = [
    "ACTIVE",
    "TRANSITIONAL",
    "DesiredState",
    "InstanceStatus",
    "InstanceType",
    "LabelOperator",
    "NodeRole",
    "NodeStatus",
    "OperationState",
    "PlacementPolicy",
    "TaintEffect",
    "TolerationOperator",
    "can_move",
]


class InstanceType(StrEnum):
    """What kind of thing an instance is."""

    VM = "vm"
    CONTAINER = "container"
    MICROVM = "microvm"


class InstanceStatus(StrEnum):
    """What an instance is, as last observed; instance.proto says what each one means."""

    PENDING = "pending"
    SCHEDULED = "scheduled"
    CREATING = "creating"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    PAUSED = "paused"
    DELETING = "deleting"
    MIGRATING = "migrating"
    FAILED = "failed"
    UNKNOWN = "unknown"


class DesiredState(StrEnum):
    """What the user wants an instance to be."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"
    PAUSED = "paused"


class NodeStatus(StrEnum):
    """Whether the control plane hears from a node and may use it."""

    READY = "ready"
    OFFLINE = "offline"
    MAINTENANCE = "maintenance"


class NodeRole(StrEnum):
    """What a node does in the cluster."""

    MASTER = "master"
    WORKER = "worker"


class OperationState(StrEnum):
    """How far an operation is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PlacementPolicy(StrEnum):
    """How nodes that fit are ranked."""

    SPREAD = "spread"
    BINPACK = "binpack"


class LabelOperator(StrEnum):
    """How the values of a label constraint are meant."""

    IN = "in"
    NOT_IN = "not_in"
    EXISTS = "exists"


class TaintEffect(StrEnum):
    """What a taint does to instances that do not tolerate it."""

    NO_SCHEDULE = "no_schedule"
    PREFER_NO_SCHEDULE = "prefer_no_schedule"


class TolerationOperator(StrEnum):
    """How the value of a toleration is meant."""

    EQUAL = "equal"
    EXISTS = "exists"


_S = InstanceStatus

_MOVES: Mapping[InstanceStatus, frozenset[InstanceStatus]] = MappingProxyType(
    {
        _S.PENDING: frozenset({_S.SCHEDULED, _S.FAILED, _S.DELETING}),
        _S.SCHEDULED: frozenset({_S.CREATING, _S.RUNNING, _S.STOPPED, _S.FAILED, _S.DELETING, _S.UNKNOWN}),
        _S.CREATING: frozenset({_S.RUNNING, _S.STOPPED, _S.FAILED, _S.DELETING, _S.UNKNOWN}),
        _S.RUNNING: frozenset(
            {_S.STOPPING, _S.STOPPED, _S.PAUSED, _S.DELETING, _S.MIGRATING, _S.FAILED, _S.UNKNOWN}
        ),
        _S.STOPPING: frozenset({_S.STOPPED, _S.RUNNING, _S.FAILED, _S.DELETING, _S.UNKNOWN}),
        # A snapshot of a paused guest can be gone back to from rest.
        _S.STOPPED: frozenset(
            {_S.CREATING, _S.RUNNING, _S.PAUSED, _S.FAILED, _S.DELETING, _S.MIGRATING, _S.UNKNOWN}
        ),
        _S.PAUSED: frozenset({_S.RUNNING, _S.STOPPING, _S.STOPPED, _S.DELETING, _S.FAILED, _S.UNKNOWN}),
        # A delete that could not be finished leaves the instance as its node then shows it.
        _S.DELETING: frozenset({_S.FAILED, _S.UNKNOWN}),
        _S.MIGRATING: frozenset({_S.RUNNING, _S.STOPPED, _S.PAUSED, _S.FAILED, _S.UNKNOWN, _S.DELETING}),
        _S.FAILED: frozenset(
            {_S.CREATING, _S.RUNNING, _S.PAUSED, _S.STOPPED, _S.DELETING, _S.SCHEDULED, _S.UNKNOWN}
        ),
        # A node that comes back reports what its instances are; a lost one is placed again.
        _S.UNKNOWN: frozenset(set(_S) - {_S.PENDING}),
    }
)

TRANSITIONAL = frozenset({_S.PENDING, _S.SCHEDULED, _S.CREATING, _S.STOPPING, _S.DELETING, _S.MIGRATING})
"""States that somebody has to bring to an end; the reconciler re-drives them."""

ACTIVE = frozenset({_S.RUNNING, _S.STOPPING, _S.PAUSED, _S.MIGRATING})
"""States in which a process or a guest exists."""


def can_move(old: InstanceStatus, new: InstanceStatus) -> bool:
    """Whether an instance may go from ``old`` to ``new``. Staying is always legal."""
    return old == new or new in _MOVES[old]
