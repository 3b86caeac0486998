"""What a drain does next, given the cluster as it is. Pure: values in, the record and actions out.

A drain always ends: when nothing is left to do, when it is cancelled, when its time is over, or when nothing of what is
left can be moved by trying again. What ended it is its message.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from msgspec import structs

from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.core.moves import MoveStrategy
from hypervisor.core.states import DesiredState, InstanceStatus, NodeStatus, OperationState
from hypervisor.server.draining.budgets import Allowances, disrupts
from hypervisor.server.draining.records import Budget, DrainKind, DrainRecord, Trouble
from hypervisor.server.moving import check_movable, plan_strategy
from hypervisor.server.services import MoveOrder

__all__ = [
    "FINAL",
    "Situation",
    "Standstill",
    "StartMove",
    "Step",
    "StopByForce",
    "failed_attempt",
    "move_order",
    "step",
    "to_be_moved",
]

FINAL = frozenset({"MOVE_LOSES_DISK", "LIVE_MOVE_UNAVAILABLE", "PINNED"})
"""Reasons that trying again does not change."""
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class StartMove:
    """Begin to move the instance."""

    instance_id: str
    order: MoveOrder


@dataclass(frozen=True, slots=True)
class StopByForce:
    """It could not leave in time: stop it where it is, at once."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class Standstill:
    """Why an instance is not being moved now. ``final``: trying again changes nothing."""

    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """The cluster at one moment. ``operations``: those of the drain's moves, by id, as far as they are known.

    ``live_refused(instance, node)``: why it cannot be moved while it runs; empty where it can.
    """

    now: datetime
    drain: DrainRecord
    nodes: Mapping[str, Node]
    instances: Iterable[Instance]
    operations: Mapping[str, OperationRecord]
    budgets: Iterable[Budget]
    live_refused: Callable[[Instance, Node | None], str]
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """The record as it is to be, what is to be begun (in this order), and why the others wait, by instance."""

    drain: DrainRecord
    actions: tuple[StartMove | StopByForce, ...] = ()
    waiting: Mapping[str, Standstill] = field(default_factory=dict)


def to_be_moved(drain: DrainRecord, instances: Iterable[Instance]) -> list[Instance]:
    """What the drain has still to bring away (or home), whatever is under way with it; in a fixed order."""
    if drain.kind is DrainKind.RESTORE:
        found = [i for i in instances if i.home == drain.node_id and i.node_id != drain.node_id]
    else:
        found = [i for i in instances if i.node_id == drain.node_id or _elsewhere(i) == drain.node_id]
    return sorted(found, key=lambda i: (i.project, i.name, i.id))


def _elsewhere(instance: Instance) -> str:
    held = instance.holds_elsewhere
    return "" if held is None else held[0]


def move_order(drain: DrainRecord, instance: Instance) -> MoveOrder:
    """How the drain moves the instance."""
    order = drain.order
    home = drain.kind is DrainKind.RESTORE
    return MoveOrder(
        node=drain.node_id if home else "",
        strategy=order.strategies.get(instance.type, MoveStrategy.AUTO),
        allow_disk_loss=order.allow_disk_loss,
        healthy_s=order.healthy_s,
        reason="brought home" if home else "its node is drained",
        drain=drain.node_id,
        keep_home=True,
    )


def step(situation: Situation) -> Step:
    """See the module's docstring."""
    drain = situation.drain
    if not drain.active:
        return Step(drain)
    everything = tuple(situation.instances)
    by_id = {instance.id: instance for instance in everything}
    drain = _settled(situation, by_id)
    forcing = drain.force_at is not None and situation.now >= drain.force_at
    left = to_be_moved(drain, everything)
    if forcing:
        left = [i for i in left if i.node_id == drain.node_id and _may_run(i)]
    if situation.cancelled:
        return Step(_ended(drain, situation, OperationState.CANCELLED, _cancelled(drain, left)))
    if not left and not drain.moving:
        return Step(_ended(drain, situation, OperationState.SUCCEEDED, _done(drain)))
    if situation.now >= drain.give_up_at:
        why = f"{_told(left)} could not be moved in {drain.order.timeout_s:g} s: {_reasons(drain, left)}"
        return Step(_ended(drain, situation, OperationState.FAILED, why))
    actions, waiting = _begun(situation, drain, left, everything, forcing=forcing)
    stuck = not actions and not drain.moving and len(waiting) == len(left)
    if stuck and all(why.final for why in waiting.values()) and drain.force_at is None:
        told = "; ".join(dict.fromkeys(why.message for why in waiting.values()))
        return Step(_ended(drain, situation, OperationState.FAILED, told), (), waiting)
    return Step(drain, actions, waiting)


def _begun(
    situation: Situation,
    drain: DrainRecord,
    left: list[Instance],
    everything: tuple[Instance, ...],
    *,
    forcing: bool,
) -> tuple[tuple[StartMove | StopByForce, ...], dict[str, Standstill]]:
    """What is to be begun now, and why the others wait."""
    free = drain.order.parallel - len(drain.moving)
    allowances = Allowances(situation.budgets, everything)
    actions: list[StartMove | StopByForce] = []
    waiting: dict[str, Standstill] = {}
    # Those that have not failed yet come first, so that one that cannot go keeps nobody from going.
    for instance in sorted(left, key=lambda i: _attempts(drain, i)):
        if instance.id in drain.moving:
            continue
        if forcing:
            why = Standstill("it is held by another operation") if instance.operation_id else None
            strategy = None
        else:
            strategy, why = _way(situation, drain, instance)
        if why is None and len(actions) >= free:
            why = Standstill(f"{drain.order.parallel} are moved at once: it waits for its turn")
        if why is None and strategy is not None and disrupts(instance, strategy):
            refused = allowances.refuses(instance)
            why = Standstill(refused) if refused else None
            if why is None:
                allowances.take(instance)
        if why is not None:
            waiting[instance.id] = why
        elif forcing:
            actions.append(StopByForce(instance.id))
        else:
            actions.append(StartMove(instance.id, move_order(drain, instance)))
    return tuple(actions), waiting


def _way(
    situation: Situation, drain: DrainRecord, instance: Instance
) -> tuple[MoveStrategy | None, Standstill | None]:
    """By which strategy it can be moved now; else why not."""
    trouble = drain.troubles.get(instance.id)
    if trouble is not None and (trouble.final or situation.now < trouble.not_before):
        return None, Standstill(trouble.message, final=trouble.final)
    if drain.kind is DrainKind.DRAIN and instance.node_id != drain.node_id:
        return None, Standstill("its old copy is being removed")
    home = situation.nodes.get(drain.node_id)
    if drain.kind is DrainKind.RESTORE and (home is None or home.status is not NodeStatus.READY):
        return None, Standstill("its home is not ready")
    order = move_order(drain, instance)
    node = situation.nodes.get(instance.node_id)
    try:
        check_movable(instance, node)
        refused = situation.live_refused(instance, node)
        return plan_strategy(instance, order.policy(instance), live_refused=refused), None
    except HypervisorError as exc:
        return None, Standstill(exc.message, final=exc.reason in FINAL)


def _settled(situation: Situation, instances: Mapping[str, Instance]) -> DrainRecord:
    """The record with the moves that ended taken in."""
    drain = situation.drain
    moving = dict(drain.moving)
    troubles = {i: trouble for i, trouble in drain.troubles.items() if i in instances}
    for instance_id, operation_id in drain.moving.items():
        operation = situation.operations.get(operation_id)
        instance = instances.get(instance_id)
        if operation is not None and not operation.done:
            continue
        if operation is None and instance is not None and instance.operation_id == operation_id:
            continue
        del moving[instance_id]
        if operation is not None and operation.error is not None and instance is not None:
            troubles[instance_id] = failed_attempt(
                troubles.get(instance_id), operation.error.message, operation.error.reason, now=situation.now
            )
        else:
            troubles.pop(instance_id, None)
    if (moving, troubles) == (drain.moving, drain.troubles):
        return drain
    return structs.replace(drain, moving=moving, troubles=troubles)


def failed_attempt(before: Trouble | None, message: str, reason: str, *, now: datetime) -> Trouble:
    """One more attempt has failed: it is tried again later, and ever later."""
    attempts = 1 if before is None else before.attempts + 1
    pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 10))
    return Trouble(
        attempts=attempts,
        message=message,
        not_before=now + timedelta(seconds=pause_s),
        final=reason in FINAL,
    )


def _attempts(drain: DrainRecord, instance: Instance) -> int:
    trouble = drain.troubles.get(instance.id)
    return 0 if trouble is None else trouble.attempts


def _may_run(instance: Instance) -> bool:
    return instance.status not in (InstanceStatus.STOPPED, InstanceStatus.FAILED) and (
        instance.desired is not DesiredState.DELETED
    )


def _ended(drain: DrainRecord, situation: Situation, state: OperationState, message: str) -> DrainRecord:
    return structs.replace(
        drain, state=state, message=message, finished_at=situation.now, moving={}, troubles={}
    )


def _done(drain: DrainRecord) -> str:
    if drain.kind is DrainKind.RESTORE:
        return "everything is home"
    stopped = f"; {drain.stopped} were stopped by force and are still on it" if drain.stopped else ""
    return f"nothing runs on it any more{stopped}"


def _cancelled(drain: DrainRecord, left: list[Instance]) -> str:
    under_way = f"; {len(drain.moving)} moves under way go on" if drain.moving else ""
    stays = "" if drain.kind is DrainKind.RESTORE else "; the node stays cordoned"
    return f"cancelled with {len(left)} instances left{under_way}{stays}"


def _told(left: list[Instance]) -> str:
    names = ", ".join(i.name for i in left[:_NAMES_SHOWN])
    more = f" and {len(left) - _NAMES_SHOWN} more" if len(left) > _NAMES_SHOWN else ""
    return f"{len(left)} instances ({names}{more})" if left else "moves under way"


def _reasons(drain: DrainRecord, left: list[Instance]) -> str:
    reasons = [drain.troubles[i.id].message for i in left if i.id in drain.troubles]
    return "; ".join(list(dict.fromkeys(reasons))[:_NAMES_SHOWN]) or "they were not done"
