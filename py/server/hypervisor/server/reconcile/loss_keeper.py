"""Carries out what ``losses`` says, on the elected leader only, every commit fenced."""

import asyncio
from collections.abc import Callable

import structlog
from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, ResourceExhausted
from hypervisor.core.model import Instance, Node
from hypervisor.core.states import DesiredState, InstanceStatus, NodeStatus
from hypervisor.server import keys
from hypervisor.server.committer import GroupCommitter, Lane
from hypervisor.server.drafts import Draft
from hypervisor.server.moving import forget_leftover
from hypervisor.server.node_changes import NODE_LOST
from hypervisor.server.placement import release
from hypervisor.server.reconcile.losses import (
    Forget,
    ForgetCopy,
    HoldMoves,
    LossAction,
    LossLimits,
    LossSituation,
    Replace,
    Start,
    decide_losses,
    may_replace,
    may_start,
    wants_replacing,
    why_not,
)
from hypervisor.server.replacing import Replacer
from hypervisor.server.store.storage import Compare
from hypervisor.server.view import StoreView

__all__ = ["LossKeeper"]

_PRINCIPAL = "system:node-loss"
_FIRST_WAIT_S = 2.0
_LONGEST_WAIT_S = 60.0

log = structlog.get_logger(__name__)


class LossKeeper:
    """What the leader does about lost nodes. ``step`` looks once and acts once."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        replacer: Replacer,
        clock: Clock,
        *,
        limits: LossLimits,
    ) -> None:
        self._view = view
        self._committer = committer
        self._replacer = replacer
        self._clock = clock
        self._limits = limits
        self._seen: dict[tuple[str, str], float] = {}
        """When this server first saw a node OFFLINE, by node and lease, on its own clock: clocks of others, and the
        times that they write into records, may be wrong."""
        self._tried: dict[str, tuple[float, float]] = {}
        """By instance: when to try again, and how long was waited."""

    async def step(self, fence: Compare) -> tuple[LossAction, ...]:
        """Look once, act once; returns what was decided."""
        self._look()
        actions = decide_losses(self._situation(), self._limits)
        async with asyncio.TaskGroup() as group:
            for action in actions:
                group.create_task(self._act(action, fence))
            group.create_task(self._explain(fence))
        return actions

    def _look(self) -> None:
        now_s = self._clock.monotonic()
        offline = {
            (found.value.id, found.value.lease_id)
            for found in self._view.nodes()
            if found.value.status is NodeStatus.OFFLINE
        }
        self._seen = {key: self._seen.get(key, now_s) for key in offline}
        self._tried = {
            key: tried for key, tried in self._tried.items() if self._view.instance(key) is not None
        }

    def _is_lost(self, instance_id: str) -> bool:
        found = self._view.instance(instance_id)
        return found is not None and _ended(found.value)

    def _fenced(self, node: Node) -> bool:
        """Whether the lost node has had the time to stop what it has to."""
        since_s = self._seen.get((node.id, node.lease_id))
        return since_s is not None and self._clock.monotonic() >= since_s + self._limits.margin_s

    def _situation(self) -> LossSituation:
        nodes = [found.value for found in self._view.nodes()]
        offline = {node.id for node in nodes if node.status is NodeStatus.OFFLINE}
        return LossSituation(
            now=self._clock.now(),
            nodes=nodes,
            fenced={node.id for node in nodes if node.id in offline and self._fenced(node)},
            instances=[
                i.value for i in self._view.instances() if i.value.node_id in offline or _ended(i.value)
            ],
            moving=sum(o.value.verb == "replace" for o in self._view.unfinished_operations()),
            waits=self._waits,
        )

    def _waits(self, instance_id: str) -> bool:
        return self._clock.monotonic() < self._tried.get(instance_id, (0.0, 0.0))[0]

    async def _act(self, action: LossAction, fence: Compare) -> None:
        try:
            match action:
                case HoldMoves(node_id, why):
                    if await self._commit(lambda draft: _hold(draft, node_id, why, fence=fence)):
                        log.error("moves_held", node_id=node_id, why=why)
                case Forget(instance_id):
                    await self._commit(
                        lambda draft: _forget(draft, instance_id, fence=fence), Lane.PLACEMENTS
                    )
                case ForgetCopy(instance):
                    await self._commit(
                        lambda draft: _forget_copy(draft, instance, fence=fence), Lane.PLACEMENTS
                    )
                case Start(instance):
                    self._later(instance.id)
                    operation = await self._replacer.start(
                        instance, lambda draft, found: _check_start(draft, found, fence), principal=_PRINCIPAL
                    )
                    if operation is not None:
                        log.info("instance_started_again", instance_id=instance.id, operation_id=operation.id)
                case Replace(instance):
                    await self._replace(instance, fence)
        except HypervisorError as exc:
            # The next look decides anew.
            log.warning("loss_action_failed", action=repr(action)[:200], reason=exc.reason, error=str(exc))

    async def _replace(self, instance: Instance, fence: Compare) -> None:
        self._later(instance.id)
        found = self._view.node(instance.node_id)
        evacuated_by = found.value.loss.evacuated_by if found is not None and found.value.loss else ""

        def check(draft: Draft, now: Instance) -> str | None:
            draft.guard(fence)
            node = draft.get(keys.node(now.node_id))
            if node is None or (now.node_id, now.epoch) != (instance.node_id, instance.epoch):
                return None
            if (
                node.value.status is NodeStatus.OFFLINE
                and draft.get(keys.node_lease(node.value.id)) is not None
            ):
                return None
            return may_replace(now, node.value, fenced=self._fenced(node.value))

        try:
            operation = await self._replacer.replace(
                instance,
                check,
                reason=NODE_LOST,
                # One that had ended by itself is not run again.
                run=instance.lost is not None,
                principal=evacuated_by or _PRINCIPAL,
                may_stay=found is not None and found.value.status is not NodeStatus.OFFLINE,
            )
        except ResourceExhausted as exc:
            await self._commit(_noting(instance.id, exc.message, fence=fence))
            return
        if operation is not None:
            log.warning(
                "instance_replaced", instance_id=instance.id, lost=instance.node_id, node_id=operation.node_id
            )

    def _later(self, instance_id: str) -> None:
        """Should it come to nothing, it is tried again, more and more rarely."""
        _, waited_s = self._tried.get(instance_id, (0.0, 0.0))
        wait_s = min(max(2 * waited_s, _FIRST_WAIT_S), _LONGEST_WAIT_S)
        self._tried[instance_id] = (self._clock.monotonic() + wait_s, wait_s)

    async def _explain(self, fence: Compare) -> None:
        """Say of instances that ask to be placed elsewhere, and are not, why not."""
        for found in tuple(self._view.nodes()):
            node = found.value
            if node.status is not NodeStatus.OFFLINE:
                continue
            for placed in tuple(self._view.instances_on(node.id)):
                instance = placed.value
                if instance.operation_id or instance.lost is None or not wants_replacing(instance):
                    continue
                why = why_not(node, instance, fenced=self._fenced(node))
                if why and why != instance.lost.waiting:
                    try:
                        await self._commit(_noting(instance.id, why, fence=fence))
                    except HypervisorError as exc:
                        log.info("loss_not_explained", instance_id=instance.id, reason=exc.reason)

    async def _commit(self, decision: Callable[[Draft], bool], lane: Lane = Lane.RECORDS) -> bool:
        return (await self._committer.commit(decision, lane=lane)).value


def _ended(instance: Instance) -> bool:
    """Whether a loss may have ended its run."""
    lost = instance.lost is not None or instance.move is not None
    return lost or instance.status_reason in ("FENCED", "NODE_RESTARTED")


def _check_start(draft: Draft, instance: Instance, fence: Compare) -> str | None:
    draft.guard(fence)
    node = draft.get(keys.node(instance.node_id))
    return "its run was ended by a loss" if node is not None and may_start(instance, node.value) else None


def _hold(draft: Draft, node_id: str, why: str, *, fence: Compare) -> bool:
    draft.guard(fence)
    found = draft.get(keys.node(node_id))
    if found is None or found.value.loss is None or found.value.loss.held or found.value.loss.evacuated_by:
        return False
    loss = structs.replace(found.value.loss, held=why)
    draft.put(keys.node(node_id), structs.replace(found.value, loss=loss, updated_at=draft.now))
    return True


def _forget(draft: Draft, instance_id: str, *, fence: Compare) -> bool:
    draft.guard(fence)
    found = draft.get(keys.instance(instance_id))
    if found is None or found.value.operation_id or found.value.desired is not DesiredState.DELETED:
        return False
    node = draft.get(keys.node(found.value.node_id))
    if node is None or node.value.loss is None or not node.value.loss.evacuated_by:
        return False
    release(draft, found.value)
    return True


def _forget_copy(draft: Draft, instance: Instance, *, fence: Compare) -> bool:
    draft.guard(fence)
    found = draft.get(keys.instance(instance.id))
    if found is None or found.value.move is None or found.value.operation_id:
        return False
    node = draft.get(keys.node(found.value.move.elsewhere[0]))
    if node is None or node.value.loss is None or not node.value.loss.evacuated_by:
        return False
    return forget_leftover(draft, instance.id, started_at=found.value.move.started_at)


def _noting(instance_id: str, why: str, *, fence: Compare) -> Callable[[Draft], bool]:
    return lambda draft: _note(draft, instance_id, why, fence=fence)


def _note(draft: Draft, instance_id: str, why: str, *, fence: Compare) -> bool:
    """Record why an instance that was lost is not placed elsewhere yet."""
    draft.guard(fence)
    found = draft.get(keys.instance(instance_id))
    if (
        found is None
        or found.value.operation_id
        or found.value.lost is None
        or found.value.lost.waiting == why
    ):
        return False
    message = found.value.status_message
    if found.value.status is InstanceStatus.UNKNOWN:
        message = f"{message.partition('; ')[0]}; {why}"
    lost = structs.replace(found.value.lost, waiting=why)
    changed = structs.replace(found.value, lost=lost, status_message=message, updated_at=draft.now)
    draft.put(keys.instance(instance_id), changed)
    return True
