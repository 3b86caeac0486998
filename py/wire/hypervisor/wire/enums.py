"""Enumerations: one table per enum, both ways; a member missing on either side fails at import."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

from hypervisor.core import availability, machines, moves, restarts, states
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.images import ImageKind, ImageState
from hypervisor.v1 import cluster_pb2, image_pb2, instance_pb2, node_pb2, operation_pb2

if TYPE_CHECKING:  # the name exists in the type stubs only
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

__all__ = [
    "DESIRED_STATE",
    "DRAIN_INSTANCE_STATE",
    "FENCING_STATE",
    "FIRMWARE",
    "IMAGE_KIND",
    "IMAGE_STATE",
    "INSTANCE_STATUS",
    "INSTANCE_TYPE",
    "LABEL_OPERATOR",
    "MOVE_PHASE",
    "MOVE_STRATEGY",
    "NODE_ROLE",
    "NODE_STATUS",
    "ON_NODE_LOSS",
    "ON_PARTITION",
    "OPERATION_STATE",
    "PLACEMENT_POLICY",
    "RESTART_CONDITION",
    "SNAPSHOT_KIND",
    "TAINT_EFFECT",
    "TOLERATION_OPERATOR",
    "VMM",
    "EnumMap",
]

E = TypeVar("E", bound=StrEnum)
V = TypeVar("V", bound=int)


class EnumMap(Generic[E, V]):
    """A domain enum and its wire enum, matched by name: ``RUNNING`` and ``INSTANCE_STATUS_RUNNING``."""

    def __init__(self, domain: type[E], wire: "_EnumTypeWrapper[V]", prefix: str) -> None:
        self._unspecified = wire.Value(f"{prefix}_UNSPECIFIED")
        self._to: Mapping[E, V] = {member: wire.Value(f"{prefix}_{member.name}") for member in domain}
        self._from: Mapping[int, E] = {number: member for member, number in self._to.items()}
        unmatched = set(wire.values()) - {self._unspecified} - set(self._from)
        if unmatched:
            raise TypeError(f"{prefix}: wire values without a domain member: {sorted(unmatched)}")

    def to_wire(self, member: E | None) -> V:
        """The wire value; None is UNSPECIFIED."""
        return self._unspecified if member is None else self._to[member]

    def from_wire(self, number: int) -> E | None:
        """The member; None for UNSPECIFIED and for numbers this version does not know."""
        return self._from.get(number)

    def required(self, number: int, field: str) -> E:
        """The member. InvalidArgument naming ``field`` and the known values for anything else."""
        member = self._from.get(number)
        if member is None:
            known = ", ".join(sorted(m.value for m in self._to))
            raise InvalidArgument.of_field(field, f"must be one of: {known}")
        return member


INSTANCE_TYPE = EnumMap(states.InstanceType, instance_pb2.InstanceType, "INSTANCE_TYPE")
INSTANCE_STATUS = EnumMap(states.InstanceStatus, instance_pb2.InstanceStatus, "INSTANCE_STATUS")
DESIRED_STATE = EnumMap(states.DesiredState, instance_pb2.DesiredState, "DESIRED_STATE")
PLACEMENT_POLICY = EnumMap(states.PlacementPolicy, instance_pb2.PlacementPolicy, "PLACEMENT_POLICY")
NODE_STATUS = EnumMap(states.NodeStatus, node_pb2.NodeStatus, "NODE_STATUS")
NODE_ROLE = EnumMap(states.NodeRole, node_pb2.NodeRole, "NODE_ROLE")
OPERATION_STATE = EnumMap(states.OperationState, operation_pb2.OperationState, "OPERATION_STATE")
LABEL_OPERATOR = EnumMap(states.LabelOperator, instance_pb2.LabelConstraint.Operator, "OPERATOR")
TAINT_EFFECT = EnumMap(states.TaintEffect, instance_pb2.TaintEffect, "TAINT_EFFECT")
TOLERATION_OPERATOR = EnumMap(states.TolerationOperator, instance_pb2.Toleration.Operator, "OPERATOR")
FIRMWARE = EnumMap(machines.Firmware, instance_pb2.Firmware, "FIRMWARE")
VMM = EnumMap(machines.VmmChoice, instance_pb2.Vmm, "VMM")
SNAPSHOT_KIND = EnumMap(machines.SnapshotKind, instance_pb2.SnapshotKind, "SNAPSHOT_KIND")
MOVE_STRATEGY = EnumMap(moves.MoveStrategy, instance_pb2.MoveStrategy, "MOVE_STRATEGY")
MOVE_PHASE = EnumMap(moves.MovePhase, instance_pb2.InstanceMove.Phase, "PHASE")
DRAIN_INSTANCE_STATE = EnumMap(moves.MoveState, cluster_pb2.DrainInstance.State, "STATE")
ON_NODE_LOSS = EnumMap(availability.OnNodeLoss, instance_pb2.OnNodeLoss, "ON_NODE_LOSS")
ON_PARTITION = EnumMap(availability.OnPartition, instance_pb2.OnPartition, "ON_PARTITION")
FENCING_STATE = EnumMap(availability.FencingState, node_pb2.FencingState, "FENCING_STATE")
IMAGE_KIND = EnumMap(ImageKind, image_pb2.ImageKind, "IMAGE_KIND")
IMAGE_STATE = EnumMap(ImageState, image_pb2.ImageState, "IMAGE_STATE")
RESTART_CONDITION = EnumMap(restarts.RestartCondition, instance_pb2.RestartCondition, "RESTART_CONDITION")
