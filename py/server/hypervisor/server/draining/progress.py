"""How a drain stands, for those who watch it. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hypervisor.core.model import Instance
from hypervisor.core.moves import MovePhase, MoveState, MoveStrategy
from hypervisor.core.states import OperationState
from hypervisor.server.draining.records import DrainRecord
from hypervisor.server.draining.stepping import Step, to_be_moved

__all__ = ["DrainProgress", "InstanceProgress", "progress_of"]


@dataclass(frozen=True, slots=True)
class InstanceProgress:
    """One instance. ``target``: id of the node it goes to, where that is known."""

    instance_id: str
    name: str
    project: str
    state: MoveState
    message: str = ""
    strategy: MoveStrategy | None = None
    target: str = ""
    operation_id: str = ""


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """A drain. ``instances``: those still to be moved, and those that a watcher saw leave since the step before."""

    node_id: str
    kind: str
    operation_id: str
    state: OperationState
    message: str
    total: int
    moved: int
    stopped: int = 0
    instances: tuple[InstanceProgress, ...] = ()
    dry_run: bool = False


def progress_of(
    drain: DrainRecord,
    look: Step,
    instances: Iterable[Instance],
    *,
    seen: Mapping[str, InstanceProgress],
    current: Mapping[str, Instance],
) -> DrainProgress:
    """The drain now. ``seen``: what this watcher was shown before; ``current``: all instances, by id."""
    left = to_be_moved(drain, instances)
    shown = [_one(drain, look, instance) for instance in left]
    here = {one.instance_id for one in shown}
    for instance_id, before in seen.items():
        if instance_id in here or before.state in (MoveState.MOVED, MoveState.GONE):
            continue
        instance = current.get(instance_id)
        state = MoveState.GONE if instance is None else MoveState.MOVED
        shown.append(
            InstanceProgress(
                instance_id,
                before.name,
                before.project,
                state,
                strategy=before.strategy,
                target="" if instance is None else instance.node_id,
                operation_id=before.operation_id,
            )
        )
    total = max(drain.total, len(left))
    moved = total - len(left)
    moving = sum(one.state is MoveState.MOVING for one in shown)
    message = drain.message or f"{moving} on the way, {len(left) - moving} wait"
    return DrainProgress(
        drain.node_id,
        drain.kind.value,
        drain.operation_id,
        drain.state,
        message,
        total,
        moved,
        drain.stopped,
        tuple(shown),
    )


def _one(drain: DrainRecord, look: Step, instance: Instance) -> InstanceProgress:
    move = instance.move
    trouble = drain.troubles.get(instance.id)
    waits = look.waiting.get(instance.id)
    operation_id = drain.moving.get(instance.id, instance.operation_id)
    if move is not None and move.phase is MovePhase.CLEANING:
        state, message = MoveState.CLEANING, ""
    elif instance.id in drain.moving:
        state, message = MoveState.MOVING, "" if move is None else move.phase.value
    elif trouble is not None:
        state = MoveState.STUCK if trouble.final else MoveState.WAITING
        again = (
            ""
            if trouble.final
            else f" (tried {trouble.attempts} times, again at {trouble.not_before:%H:%M:%S})"
        )
        message = trouble.message + again
    elif waits is not None:
        state, message = MoveState.STUCK if waits.final else MoveState.WAITING, waits.message
    else:
        state, message = MoveState.WAITING, ""
    return InstanceProgress(
        instance.id,
        instance.name,
        instance.project,
        state,
        message,
        None if move is None else move.strategy,
        "" if move is None else move.target,
        operation_id,
    )
