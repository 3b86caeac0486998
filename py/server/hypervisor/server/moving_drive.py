"""Drives moves: calls the agents of both nodes, step by step, each taken on record before the next.

Every step can be repeated, and what the record says is enough to go on from it, so a server may die at any point. What
the steps make of the records is decided in ``moving.py``.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    Cancelled,
    FailedPrecondition,
    HypervisorError,
    Internal,
    Unavailable,
)
from hypervisor.core.images import ImageSource
from hypervisor.core.model import Instance, Observation, OperationRecord
from hypervisor.core.moves import MovePhase, MoveRecord, MoveStrategy
from hypervisor.core.states import InstanceStatus, NodeStatus
from hypervisor.server import keys, moving
from hypervisor.server.agents import Agent, Agents, CallContext
from hypervisor.server.committer import GroupCommitter, Lane
from hypervisor.server.drafts import Decision
from hypervisor.server.failures import error_of
from hypervisor.server.live_moves import LiveMoves
from hypervisor.server.outcomes import TAKEN_OVER
from hypervisor.server.verbs import node_unreachable

__all__ = ["MoveDriver", "Recorder"]

T = TypeVar("T")

_DEFAULT_GRACE_S = 10.0
_LOOK_S = 1.0
"""How often a copy is looked at while it proves itself."""

log = structlog.get_logger(__name__)


class Recorder(Protocol):
    """Commits what came of work that is done, and goes on trying until the store takes it."""

    async def __call__(self, decision: Decision[OperationRecord], *, lane: Lane) -> OperationRecord: ...


@dataclass(frozen=True, slots=True)
class _Job:
    """One move, as this server drives it."""

    operation_id: str
    request_id: str
    grace_s: float
    cancel: asyncio.Future[None] | None
    """Done once nobody wants it any more; None where that makes no difference."""


class MoveDriver:
    """See the module's docstring. ``cleanup_s``: how long a node is given to remove a copy, before that is left for
    later."""

    def __init__(
        self,
        committer: GroupCommitter,
        agents: Agents,
        clock: Clock,
        *,
        server_id: str,
        images: Callable[[Instance], tuple[ImageSource, ...]],
        delays: Callable[[], Iterator[float]],
        record: Recorder,
        live: LiveMoves,
        cleanup_s: float,
    ) -> None:
        self._committer = committer
        self._agents = agents
        self._clock = clock
        self._server_id = server_id
        self._images = images
        self._delays = delays
        self._record = record
        self._live = live
        self._cleanup_s = cleanup_s

    async def drive(self, operation_id: str, cancel: asyncio.Future[None], *, request_id: str) -> None:
        """Drive the move to its end. Raises Conflict (``OPERATION_TAKEN_OVER``) when it is another's by now."""
        while True:
            operation, instance, move = self._state(operation_id)
            grace_s = _DEFAULT_GRACE_S if operation.grace_period_s is None else operation.grace_period_s
            job = _Job(operation_id, request_id, grace_s, cancel)
            match move.phase:
                case MovePhase.CLEANING:
                    await self._clean(job, instance)
                    return
                case MovePhase.UNDOING:
                    await self._undo(job, operation, instance, move)
                    return
            try:
                await self._go_on(job, instance, move)
            except HypervisorError as exc:
                if exc.reason == TAKEN_OVER:
                    raise
                log.warning(
                    "move_turned_back",
                    operation_id=operation_id,
                    instance_id=instance.id,
                    phase=move.phase.value,
                    reason=exc.reason,
                    error=str(exc),
                )
                await self._commit(moving.turn_back, operation_id, exc)

    def _state(self, operation_id: str) -> tuple[OperationRecord, Instance, MoveRecord]:
        operation = self._committer.find(keys.operation(operation_id))
        found = None if operation is None else self._committer.find(keys.instance(operation.value.object_id))
        if operation is None or found is None or found.value.move is None:
            raise Internal(f"operation {operation_id} moves nothing")
        return operation.value, found.value, found.value.move

    # --- the steps

    async def _go_on(self, job: _Job, instance: Instance, move: MoveRecord) -> None:
        until = instance.transition_deadline or self._clock.now()
        match move.phase:
            case MovePhase.STOPPING:
                await self._say(job, "stopping it on its old node", 20)
                await self._ask(
                    job,
                    instance,
                    lambda agent, context: agent.stop(instance, context, grace_s=job.grace_s),
                    until=until,
                )
                await self._commit(moving.advance, job.operation_id, phase=MovePhase.MAKING)
            case MovePhase.STARTING | MovePhase.MAKING:
                copy = moving.copy_elsewhere(instance)
                await self._commit(
                    moving.advance,
                    job.operation_id,
                    asked_target=True,
                    message="making it on its new node",
                    percent=50,
                )
                reply = await self._ask(
                    job,
                    copy,
                    lambda agent, context: agent.create(
                        copy, context, start=move.runs, images=self._images(instance)
                    ),
                    until=until,
                )
                if move.runs:
                    reply = await self._proven(job, copy, move, reply, until=until)
                await self._commit(moving.switch, job.operation_id, reply)
                log.info(
                    "instance_switched",
                    instance_id=instance.id,
                    source=move.source,
                    target=move.target,
                    epoch=move.target_epoch,
                )
            case MovePhase.MIGRATING:
                copy = moving.copy_elsewhere(instance)
                await self._commit(
                    moving.advance,
                    job.operation_id,
                    asked_target=True,
                    message="taking its memory along",
                    percent=50,
                )
                source = self._agent(instance)
                reply = await self._ask(
                    job,
                    copy,
                    lambda agent, context: self._live.move(instance, copy, source, agent, context),
                    until=until,
                )
                await self._commit(moving.switch, job.operation_id, reply)

    async def _proven(
        self, job: _Job, copy: Instance, move: MoveRecord, seen: Observation, *, until: datetime
    ) -> Observation:
        """The copy, once it has run for as long as is asked; FailedPrecondition (``MOVE_COPY_ENDED``)."""
        left_s = move.policy.healthy_s
        while True:
            if seen.status is not InstanceStatus.RUNNING:
                code = "" if seen.exit_code is None else f" with exit code {seen.exit_code}"
                raise FailedPrecondition(
                    f"the copy of instance {copy.name} on its new node is {seen.status.value}{code}: "
                    + (seen.message or "it did not go on running"),
                    reason="MOVE_COPY_ENDED",
                    metadata={"instance_id": copy.id, "node_id": copy.node_id},
                )
            if left_s <= 0:
                return seen
            pause_s = min(left_s, _LOOK_S)
            await self._attend(self._clock.sleep(pause_s), job)
            left_s -= pause_s
            looked = await self._look(job, copy, until=until)
            if looked is None:
                raise FailedPrecondition(
                    f"the copy of instance {copy.name} vanished from its new node",
                    reason="MOVE_COPY_ENDED",
                    metadata={"instance_id": copy.id, "node_id": copy.node_id},
                )
            seen = looked

    async def _undo(
        self, job: _Job, operation: OperationRecord, instance: Instance, move: MoveRecord
    ) -> None:
        if operation.error is None:
            raise Internal(f"the move of operation {operation.id} is undone for no reason")
        error = error_of(operation.error, operation_id=operation.id)
        quiet = _Job(job.operation_id, job.request_id, 0.0, None)
        removed = not move.asked_target or await self._removed(quiet, moving.copy_elsewhere(instance))
        until = self._clock.now() + timedelta(seconds=self._cleanup_s)
        reply: Observation | None = None
        try:
            if move.runs and move.strategy is MoveStrategy.STOP:
                reply = await self._ask(
                    quiet, instance, lambda agent, context: agent.start(instance, context), until=until
                )
            else:
                reply = await self._look(quiet, instance, until=until)
        except HypervisorError as exc:
            # The reconciler asks its node once that answers.
            log.warning("move_source_unknown", instance_id=instance.id, reason=exc.reason, error=str(exc))
        await self._commit(
            moving.turned_back, job.operation_id, error, reply, removed=removed, lane=Lane.PLACEMENTS
        )

    async def _clean(self, job: _Job, instance: Instance) -> None:
        quiet = _Job(job.operation_id, job.request_id, job.grace_s, None)
        removed = await self._removed(quiet, moving.copy_elsewhere(instance))
        await self._commit(moving.end_move, job.operation_id, removed=removed, lane=Lane.PLACEMENTS)
        log.info("operation_succeeded", operation_id=job.operation_id, verb="move", instance_id=instance.id)

    # --- what moves left behind

    async def remove_copy(self, instance: Instance, *, request_id: str) -> bool:
        """Remove the copy where the instance is not; whether its node confirms that nothing is left there."""
        return await self._removed(_Job("", request_id, 0.0, None), moving.copy_elsewhere(instance))

    async def _removed(self, job: _Job, copy: Instance) -> bool:
        until = self._clock.now() + timedelta(seconds=self._cleanup_s + job.grace_s)
        try:
            await self._ask(
                job,
                copy,
                lambda agent, context: agent.delete(copy, context, grace_s=job.grace_s),
                until=until,
            )
        except HypervisorError as exc:
            log.warning(
                "copy_not_removed",
                instance_id=copy.id,
                node_id=copy.node_id,
                reason=exc.reason,
                error=str(exc),
            )
            return False
        return True

    # --- asking

    def _agent(self, copy: Instance) -> Agent:
        node = self._committer.find(keys.node(copy.node_id))
        if node is None or node.value.status is NodeStatus.OFFLINE:
            raise node_unreachable(copy, node.value if node else None)
        return self._agents.agent(node.value)

    async def _look(self, job: _Job, copy: Instance, *, until: datetime) -> Observation | None:
        """The copy as its node sees it; None where the node does not have it."""
        seen = await self._ask(job, copy, lambda agent, context: agent.list(context), until=until)
        return next((o for o in seen if (o.instance_id, o.epoch) == (copy.id, copy.epoch)), None)

    async def _ask(
        self,
        job: _Job,
        copy: Instance,
        call: Callable[[Agent, CallContext], Coroutine[Any, Any, T]],
        *,
        until: datetime,
    ) -> T:
        """The answer of the copy's node; calls again while that cannot be reached, ``until`` then."""
        delays = self._delays()
        while True:
            node = self._committer.find(keys.node(copy.node_id))
            if node is None or node.value.status is NodeStatus.OFFLINE:
                raise node_unreachable(copy, node.value if node else None)
            left_s = (until - self._clock.now()).total_seconds()
            if left_s <= 0:
                raise node_unreachable(copy, node.value)
            context = CallContext(job.request_id, left_s)
            try:
                return await self._attend(call(self._agents.agent(node.value), context), job)
            except Unavailable as exc:
                if exc.reason != "NODE_UNREACHABLE":
                    raise
                log.warning(
                    "agent_unreachable",
                    operation_id=job.operation_id,
                    node=node.value.hostname,
                    error=str(exc),
                )
            await self._attend(self._clock.sleep(next(delays)), job)

    async def _attend(self, work: Coroutine[Any, Any, T], job: _Job) -> T:
        """Await the work; end it and raise Cancelled when the move is no longer wanted."""
        if job.cancel is None:
            return await work
        task = asyncio.create_task(work, name=f"move-{job.operation_id}")
        either: set[asyncio.Future[Any]] = {task, job.cancel}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Cancelled(
                "the move was cancelled",
                reason="OPERATION_CANCELLED",
                metadata={"operation_id": job.operation_id},
            )
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _say(self, job: _Job, message: str, percent: int) -> None:
        await self._commit(moving.advance, job.operation_id, message=message, percent=percent)

    def _commit(
        self,
        decide: Callable[..., OperationRecord],
        operation_id: str,
        *arguments: object,
        lane: Lane = Lane.RECORDS,
        **named: object,
    ) -> Awaitable[OperationRecord]:
        return self._record(
            lambda draft: decide(draft, operation_id, *arguments, server_id=self._server_id, **named),
            lane=lane,
        )
