"""Moving an instance to another node: the records of it. Pure decisions; ``moving_drive.py`` calls the agents.

While an instance moves, its record names the move (``Instance.move``), and what it holds is reserved on both nodes, so
that at every revision a node's allocation is the sum of what is placed there and what moves reserve there. Which copy
is the instance is told by its ``node_id`` and ``epoch`` alone; one transaction changes both (:func:`switch`). Every
attempt has an epoch that no copy ever had, so that whatever an attempt left anywhere is never taken for the instance.

What is left where the instance is not (an old copy, or a copy that came to nothing) is removed before the reservation
there is given back. A node that does not answer holds nobody up: the operation ends, the move stays in the record, and
the leader has the rest removed as soon as the node is there.
"""

from collections.abc import Callable
from datetime import datetime

from msgspec import structs

from hypervisor.core.errors import Conflict, FailedPrecondition, HypervisorError
from hypervisor.core.model import Instance, Node, Observation, OperationRecord
from hypervisor.core.moves import MovePhase, MovePolicy, MoveRecord, MoveStrategy
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, NodeStatus
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.live_moves import LiveMoves
from hypervisor.server.observations import settle
from hypervisor.server.outcomes import driven_operation, end_operation
from hypervisor.server.placement import Placer, check_same_request, give_back
from hypervisor.server.services import InstanceRef, MoveOrder
from hypervisor.server.verbs import check_version, find_instance, node_unreachable

__all__ = [
    "advance",
    "begin_move",
    "check_movable",
    "check_target",
    "copy_elsewhere",
    "end_move",
    "forget_leftover",
    "plan_strategy",
    "switch",
    "turn_back",
    "turned_back",
    "what_is_lost",
]

_MOVABLE = frozenset({InstanceStatus.RUNNING, InstanceStatus.STOPPED, InstanceStatus.FAILED})


def what_is_lost(instance: Instance) -> str:
    """What does not come along when it is made anew on another node, for people; empty where nothing counts.

    A container is made to be replaced: what it wrote outside of its image is not counted.
    """
    if instance.type is InstanceType.CONTAINER or not (instance.spec.image or instance.spec.disk_gb):
        return ""
    size = f" of {instance.spec.disk_gb} GiB" if instance.spec.disk_gb else ""
    return f"what was written to its disk{size} since it was made, and its snapshots"


def plan_strategy(instance: Instance, policy: MovePolicy, *, live_refused: str) -> MoveStrategy:
    """How it is to be moved. Raises FailedPrecondition: ``LIVE_MOVE_UNAVAILABLE``, ``MOVE_LOSES_DISK``.

    ``live_refused``: why it cannot be moved while it runs; empty where it can.
    """
    strategy = policy.strategy
    if instance.status is not InstanceStatus.RUNNING:
        live_refused = f"it is {instance.status.value}, so there is no memory to take along"
    if strategy is MoveStrategy.LIVE and live_refused:
        raise FailedPrecondition(
            f"instance {instance.name} cannot be moved live: {live_refused}",
            reason="LIVE_MOVE_UNAVAILABLE",
            metadata={"instance_id": instance.id, "type": instance.type.value},
        )
    if strategy is MoveStrategy.AUTO:
        match instance.type:
            case InstanceType.VM | InstanceType.MICROVM if not live_refused:
                strategy = MoveStrategy.LIVE
            case InstanceType.VM:
                strategy = MoveStrategy.STOP
            case _:
                strategy = MoveStrategy.REPLACE
    lost = "" if strategy is MoveStrategy.LIVE else what_is_lost(instance)
    if lost and not policy.allow_disk_loss:
        raise FailedPrecondition(
            f"instance {instance.name} has its disk on its node, and {strategy.value} makes it anew from its image "
            f"elsewhere; lost would be {lost}. Allow it (allow_disk_loss of the move or of spec.move, "
            "--allow-disk-loss) or leave it where it is",
            reason="MOVE_LOSES_DISK",
            metadata={"instance_id": instance.id, "strategy": strategy.value},
        )
    return strategy


def check_movable(instance: Instance, node: Node | None) -> None:
    """Refuse to move what nothing can be moved of now: Conflict, FailedPrecondition, Unavailable."""
    metadata = {"instance_id": instance.id, "status": instance.status.value}
    if instance.operation_id:
        raise Conflict(
            f"instance {instance.name} is held by operation {instance.operation_id}: wait for it, then try again",
            reason="CONCURRENT_OPERATION",
            metadata={**metadata, "operation_id": instance.operation_id},
        )
    if instance.desired is DesiredState.DELETED:
        raise FailedPrecondition(
            f"instance {instance.name} is being deleted", reason="INSTANCE_DELETING", metadata=metadata
        )
    if instance.move is not None:
        other = instance.move.elsewhere[0]
        raise Conflict(
            f"what its last move left of instance {instance.name} on node {other} is not removed yet, which goes on "
            "as soon as that node answers: try again then",
            reason="MOVE_UNFINISHED",
            metadata={**metadata, "node": other},
        )
    if node is None or node.status is NodeStatus.OFFLINE:
        raise node_unreachable(instance, node)
    if instance.status not in _MOVABLE:
        advice = (
            "its memory would be lost: resume or stop it first"
            if instance.status is InstanceStatus.PAUSED
            else "wait until that is over"
        )
        raise FailedPrecondition(
            f"instance {instance.name} is {instance.status.value}: {advice}",
            reason="NOT_MOVABLE",
            metadata=metadata,
        )


def begin_move(
    draft: Draft,
    *,
    placer: Placer,
    live: LiveMoves,
    ref: InstanceRef,
    order: MoveOrder,
    operation: OperationRecord,
    deadline: datetime,
    also: Callable[[Draft, OperationRecord], None] = lambda draft, operation: None,
) -> OperationRecord:
    """Record that the move begins, with what it needs reserved on its target; or find what a repeat began.

    Raises what :func:`check_movable`, :func:`plan_strategy` and ``Placer.reserve_elsewhere`` raise, and
    FailedPrecondition (``ALREADY_THERE``, ``PINNED``).
    """
    operation_key = keys.operation(operation.id)
    known = draft.get(operation_key) if operation.request_id else None
    if known is not None:
        check_same_request(known.value, operation)
        return known.value
    found = find_instance(draft, ref)
    instance = found.value
    check_version(found, ref.resource_version, what=f"instance {instance.name}")
    source = draft.peek(keys.node(instance.node_id))
    node = None if source is None else source.value
    check_movable(instance, node)
    policy = order.policy(instance)
    strategy = plan_strategy(instance, policy, live_refused=live.why_not(instance, node))
    check_target(draft, instance, order)
    epoch = instance.next_epoch
    target, placement = placer.reserve_elsewhere(draft, instance, node=order.node, epoch=epoch)
    runs = instance.status is InstanceStatus.RUNNING
    stopping = strategy is MoveStrategy.STOP and runs
    move = MoveRecord(
        strategy=strategy,
        phase=MovePhase.STOPPING if stopping else _making(strategy),
        source=instance.node_id,
        source_epoch=instance.epoch,
        target=target,
        target_epoch=epoch,
        started_at=draft.now,
        runs=runs,
        held=instance.holds,
        policy=policy,
        reason=order.reason,
        drain=order.drain,
        home=_home_after(instance, order, target=target),
        loses="" if strategy is MoveStrategy.LIVE else what_is_lost(instance),
    )
    draft.put(
        keys.instance(instance.id),
        structs.replace(
            instance,
            status=InstanceStatus.MIGRATING,
            status_reason="",
            status_message=order.reason,
            operation_id=operation.id,
            transition_deadline=deadline,
            move=move,
            last_epoch=epoch,
            placement=placement,
            updated_at=draft.now,
        ),
    )
    recorded = structs.replace(
        operation,
        object_id=instance.id,
        object_name=instance.name,
        project=instance.project,
        node_id=target,
    )
    if operation.request_id:
        draft.put(operation_key, recorded)
    else:
        draft.create(operation_key, recorded)
    also(draft, recorded)
    return recorded


def _making(strategy: MoveStrategy) -> MovePhase:
    match strategy:
        case MoveStrategy.LIVE:
            return MovePhase.MIGRATING
        case MoveStrategy.STOP:
            return MovePhase.MAKING
        case _:
            return MovePhase.STARTING


def check_target(draft: Draft, instance: Instance, order: MoveOrder) -> None:
    """Refuse a target that is none, and to move what is pinned: FailedPrecondition (``ALREADY_THERE``, ``PINNED``)."""
    source = draft.peek(keys.node(instance.node_id))
    hostname = instance.node_id if source is None else source.value.hostname
    here = {instance.node_id, hostname}
    metadata = {"instance_id": instance.id, "node": order.node or instance.spec.node}
    if order.node and order.node in here:
        raise FailedPrecondition(
            f"instance {instance.name} is on node {hostname} already",
            reason="ALREADY_THERE",
            metadata=metadata,
        )
    pinned = instance.spec.node
    if not pinned:
        return
    claim = draft.peek(keys.hostname(pinned))
    allowed = {pinned} if claim is None else {pinned, claim.value.node_id}
    if pinned in here or (order.node and order.node not in allowed):
        raise FailedPrecondition(
            f"instance {instance.name} is pinned to node {pinned} (spec.node), so it cannot go elsewhere: delete it, "
            "or make it anew without",
            reason="PINNED",
            metadata=metadata,
        )


def _home_after(instance: Instance, order: MoveOrder, *, target: str) -> str:
    if not order.keep_home:
        return ""  # whoever moves it by hand has chosen its place
    home = instance.home or instance.node_id
    return "" if home == target else home


def copy_elsewhere(instance: Instance) -> Instance:
    """The copy of a moving instance that is not (or not yet) the instance: as its node is to be told of it."""
    if instance.move is None:
        raise ValueError(f"instance {instance.id} does not move")
    node_id, epoch = instance.move.elsewhere
    return structs.replace(instance, node_id=node_id, epoch=epoch)


def advance(
    draft: Draft,
    operation_id: str,
    *,
    server_id: str,
    phase: MovePhase | None = None,
    asked_target: bool = False,
    message: str = "",
    percent: int = 0,
) -> OperationRecord:
    """Take a step on record: another phase, or that the target is about to be asked for a copy."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance, move = _moving(draft, operation)
    changed = structs.replace(move, phase=phase or move.phase, asked_target=move.asked_target or asked_target)
    if changed != move:
        draft.put(keys.instance(instance.id), structs.replace(instance, move=changed, updated_at=draft.now))
    if message:
        operation = structs.replace(operation, progress_message=message, progress_percent=percent)
        draft.put(keys.operation(operation_id), operation)
    return operation


def switch(draft: Draft, operation_id: str, reply: Observation, *, server_id: str) -> OperationRecord:
    """The copy on the target is the instance from now on, as its node has just described it."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance, move = _moving(draft, operation)
    there = structs.replace(
        instance,
        node_id=move.target,
        epoch=move.target_epoch,
        last_epoch=0,
        observed_sequence=0,
        home=move.home,
        status_message="",
    )
    there = settle(there, reply, now=draft.now)
    draft.put(
        keys.instance(instance.id),
        structs.replace(
            there,
            operation_id=operation_id,
            transition_deadline=instance.transition_deadline,
            move=structs.replace(move, phase=MovePhase.CLEANING, asked_target=True),
        ),
    )
    moved = structs.replace(
        operation, progress_message="on its new node; removing the old copy", progress_percent=80
    )
    draft.put(keys.operation(operation_id), moved)
    return moved


def turn_back(draft: Draft, operation_id: str, error: HypervisorError, *, server_id: str) -> OperationRecord:
    """It comes to nothing: from now on the target's copy is removed and the source's goes on."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance, move = _moving(draft, operation)
    draft.put(
        keys.instance(instance.id),
        structs.replace(
            instance,
            move=structs.replace(move, phase=MovePhase.UNDOING),
            status_message=f"the move failed: {error.message}",
            updated_at=draft.now,
        ),
    )
    undone = end_operation(operation, error, now=draft.now)
    # It ends when it is undone; what it will end with has to outlive this server.
    changed = structs.replace(operation, error=undone.error, progress_message=f"undoing: {error.message}")
    draft.put(keys.operation(operation_id), changed)
    return changed


def turned_back(
    draft: Draft,
    operation_id: str,
    error: HypervisorError,
    reply: Observation | None,
    *,
    server_id: str,
    removed: bool,
) -> OperationRecord:
    """The source goes on as ``reply`` says (None: nobody can tell now). ``removed``: nothing is left on the target."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance, move = _moving(draft, operation)
    if reply is not None:
        settled = settle(structs.replace(instance, status=InstanceStatus.UNKNOWN), reply, now=draft.now)
    else:
        settled = structs.replace(
            instance,
            status=InstanceStatus.UNKNOWN,
            status_reason="NODE_UNREACHABLE",
            operation_id="",
            transition_deadline=None,
            updated_at=draft.now,
        )
    settled = structs.replace(settled, status_message=f"the move failed: {error.message}")
    if removed:
        give_back(draft, move.target, move.held)
        settled = structs.replace(settled, move=None)
    draft.put(keys.instance(instance.id), settled)
    ended = end_operation(operation, error, now=draft.now)
    draft.put(keys.operation(operation_id), ended)
    return ended


def end_move(draft: Draft, operation_id: str, *, server_id: str, removed: bool) -> OperationRecord:
    """The instance is on its new node. ``removed``: nothing is left on the old one, so what it held there is free."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance, move = _moving(draft, operation)
    settled = structs.replace(instance, operation_id="", transition_deadline=None, updated_at=draft.now)
    if removed:
        give_back(draft, move.source, move.held)
        settled = structs.replace(settled, move=None)
    draft.put(keys.instance(instance.id), settled)
    ended = end_operation(operation, None, now=draft.now)
    if not removed:
        note = "moved; the old copy is removed as soon as its node answers"
        ended = structs.replace(ended, progress_message=note)
    draft.put(keys.operation(operation_id), ended)
    return ended


def forget_leftover(draft: Draft, instance_id: str, *, started_at: datetime) -> bool:
    """What a move left is removed: give back what it held. ``started_at`` tells which move is meant."""
    found = draft.get(keys.instance(instance_id))
    if found is None or found.value.operation_id:
        return False
    instance = found.value
    if instance.move is None or instance.move.started_at != started_at:
        return False
    give_back(draft, instance.move.elsewhere[0], instance.move.held)
    draft.put(keys.instance(instance_id), structs.replace(instance, move=None, updated_at=draft.now))
    return True


def _moving(draft: Draft, operation: OperationRecord) -> tuple[Instance, MoveRecord]:
    found = draft.get(keys.instance(operation.object_id))
    if found is None or found.value.operation_id != operation.id or found.value.move is None:
        raise Conflict(
            f"operation {operation.id} does not move instance {operation.object_name} (any more)",
            reason="OPERATION_TAKEN_OVER",
            metadata={"operation_id": operation.id},
        )
    return found.value, found.value.move
