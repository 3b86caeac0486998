"""Moves of instances on the wire."""

from hypervisor.core.model import Instance
from hypervisor.core.moves import MovePolicy, MoveStrategy
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import MOVE_PHASE, MOVE_STRATEGY
from hypervisor.wire.times import duration_of, timestamp_of

__all__ = ["move_to_wire", "policy_from_wire", "policy_to_wire"]


def policy_to_wire(policy: MovePolicy | None) -> instance_pb2.MovePolicy | None:
    """How an instance is to be moved."""
    if policy is None:
        return None
    return instance_pb2.MovePolicy(
        strategy=MOVE_STRATEGY.to_wire(policy.strategy),
        healthy_after=duration_of(policy.healthy_s),
        allow_disk_loss=policy.allow_disk_loss,
    )


def policy_from_wire(spec: instance_pb2.InstanceSpec) -> MovePolicy | None:
    """How an instance is to be moved; None where nothing is said. Limits are not checked here."""
    if not spec.HasField("move"):
        return None
    return MovePolicy(
        strategy=MOVE_STRATEGY.from_wire(spec.move.strategy) or MoveStrategy.AUTO,
        healthy_s=spec.move.healthy_after.ToTimedelta().total_seconds(),
        allow_disk_loss=spec.move.allow_disk_loss,
    )


def move_to_wire(instance: Instance) -> instance_pb2.InstanceMove | None:
    """The move of an instance; None where it does not move."""
    move = instance.move
    if move is None:
        return None
    return instance_pb2.InstanceMove(
        source_node_id=move.source,
        source_epoch=move.source_epoch,
        target_node_id=move.target,
        target_epoch=move.target_epoch,
        strategy=MOVE_STRATEGY.to_wire(move.strategy),
        phase=MOVE_PHASE.to_wire(move.phase),
        reason=move.reason,
        loses=move.loses,
        started_at=timestamp_of(move.started_at),
    )
