"""What a drain would do, without doing it: for each instance how and where to, or why not. Records nothing."""

from collections.abc import Sequence

from hypervisor.core.errors import Conflict, HypervisorError
from hypervisor.core.model import Instance
from hypervisor.core.moves import MoveState, MoveStrategy
from hypervisor.core.states import OperationState
from hypervisor.server.drafts import Batch
from hypervisor.server.draining.budgets import Allowances, disrupts
from hypervisor.server.draining.progress import DrainProgress, InstanceProgress
from hypervisor.server.draining.stepping import FINAL, Situation, move_order
from hypervisor.server.moving import check_movable, check_target, plan_strategy, what_is_lost
from hypervisor.server.placement import Placer
from hypervisor.server.placement_terms import UNREGISTERED

__all__ = ["plan_drain"]


def plan_drain(batch: Batch, placer: Placer, situation: Situation, left: Sequence[Instance]) -> DrainProgress:
    """The plan. The instances are placed one after another in ``batch``, which is never committed, so that each is
    planned with what those before it take."""
    allowances = Allowances(situation.budgets, situation.instances)
    planned = [_one(batch, placer, situation, allowances, instance) for instance in left]
    drain = situation.drain
    stuck = sum(one.state is not MoveState.PLANNED for one in planned)
    return DrainProgress(
        node_id=drain.node_id,
        kind=drain.kind.value,
        operation_id="",
        state=OperationState.SUCCEEDED,
        message=f"{len(planned) - stuck} would go, {stuck} could not go now"
        if planned
        else "nothing to move",
        total=len(planned),
        moved=0,
        instances=tuple(planned),
        dry_run=True,
    )


def _one(
    batch: Batch, placer: Placer, situation: Situation, allowances: Allowances, instance: Instance
) -> InstanceProgress:
    order = move_order(situation.drain, instance)
    node = situation.nodes.get(instance.node_id)
    strategy: MoveStrategy | None = None
    draft = batch.draft()
    target, message, state = "", "", MoveState.PLANNED
    try:
        check_movable(instance, node)
        refused = situation.live_refused(instance, node)
        strategy = plan_strategy(instance, order.policy(instance), live_refused=refused)
        check_target(draft, instance, order)
        target, _ = placer.reserve_elsewhere(draft, instance, node=order.node, epoch=instance.next_epoch)
        batch.admit(draft)
    except HypervisorError as exc:
        if not (isinstance(exc, Conflict) and exc.reason == UNREGISTERED):
            state = MoveState.STUCK if exc.reason in FINAL else MoveState.WAITING
            message = exc.message
    if state is MoveState.PLANNED and strategy is not None and disrupts(instance, strategy):
        message = "its turn comes later: " + waits if (waits := allowances.refuses(instance)) else ""
        if not message:
            allowances.take(instance)
    if state is MoveState.PLANNED and strategy is not MoveStrategy.LIVE:
        lost = what_is_lost(instance)
        message = "; ".join(filter(None, (message, f"lost is {lost}" if lost else "")))
    return InstanceProgress(instance.id, instance.name, instance.project, state, message, strategy, target)
