"""Drives accepted operations to their end: calls the agent, then commits what came of it.

An operation is in the store before it is driven, and every call to an agent is idempotent, so a server may die at any
point: another one (or itself, started again) drives the operation anew. Nothing here decides what an end means for the
records; that is ``outcomes.py``.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    HypervisorError,
    Internal,
    Unavailable,
)
from hypervisor.core.images import ImageSource
from hypervisor.core.model import Instance, Observation, OperationRecord
from hypervisor.core.retry import Backoff
from hypervisor.core.states import DesiredState, NodeStatus
from hypervisor.server import keys, outcomes
from hypervisor.server.agents import Agent, Agents, CallContext
from hypervisor.server.committer import Decided, GroupCommitter, Lane
from hypervisor.server.drafts import Decision, Draft
from hypervisor.server.live_moves import LiveMoves, NoLiveMoves
from hypervisor.server.moving import copy_elsewhere, forget_leftover
from hypervisor.server.moving_drive import MoveDriver
from hypervisor.server.operations import Waiters
from hypervisor.server.placement import release
from hypervisor.server.services import Versioned
from hypervisor.server.verbs import LED, node_unreachable
from hypervisor.server.view import StoreView

__all__ = ["ExecutorSettings", "OperationExecutor"]

T = TypeVar("T")
ImagesOf = Callable[[Instance], tuple[ImageSource, ...]]
"""What a node is told of the images that an instance names."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """How long things may take, in seconds, and how many operations are driven at once."""

    create_s: float = 300.0
    start_s: float = 120.0
    stop_s: float = 60.0
    """Besides the grace period; likewise for restart and delete."""
    delete_s: float = 120.0
    cleanup_s: float = 30.0
    slow_s: float = 0.25
    """After so long an operation shows progress."""
    concurrency: int = 512
    backoff: Backoff = field(default_factory=lambda: Backoff(initial_s=0.2, maximum_s=3.0))

    def deadline(self, now: datetime, verb: str, *, grace_s: float | None = None) -> datetime:
        """When an operation accepted ``now`` is out of time."""
        return now + timedelta(seconds=self.time_for(verb, grace_s))

    def time_for(self, verb: str, grace_s: float | None) -> float:
        """How long an operation may take from its acceptance."""
        match verb:
            case "move":
                base = self.stop_s + self.create_s + self.start_s
            case "create" | "recreate" | "replace" | "suspend" | "create-snapshot" | "restore-snapshot":
                # All of these may move as much data as a disk or a memory holds.
                base = self.create_s
            case "start":
                base = self.start_s
            case "delete" | "delete-snapshot":
                base = self.delete_s
            case _:
                base = self.stop_s
        return base + (grace_s or 0.0) + (self.start_s if verb == "restart" else 0.0)


@dataclass(slots=True, eq=False)
class _Driven:
    cancel: asyncio.Future[None]
    request_id: str
    untried: bool
    """Whether no agent can have been asked for it yet: by this server, or by one before it."""


class OperationExecutor:
    """See the module's docstring. ``run`` owns all the work; ``begin`` hands operations in."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        agents: Agents,
        waiters: Waiters,
        clock: Clock,
        *,
        server_id: str,
        rng: random.Random,
        images: ImagesOf,
        settings: ExecutorSettings | None = None,
        live: LiveMoves | None = None,
    ) -> None:
        self._view = view
        self._committer = committer
        self._agents = agents
        self._waiters = waiters
        self._clock = clock
        self._server_id = server_id
        self._rng = rng
        self._images = images
        self._settings = settings or ExecutorSettings()
        self._group: asyncio.TaskGroup | None = None
        self._slots = asyncio.Semaphore(self._settings.concurrency)
        self._driven: dict[str, _Driven] = {}
        self._removing: set[str] = set()
        self._mover = MoveDriver(
            committer,
            agents,
            clock,
            server_id=server_id,
            images=images,
            delays=lambda: self._settings.backoff.delays(self._rng),
            record=self._end,
            live=live or NoLiveMoves(),
            cleanup_s=self._settings.cleanup_s,
        )
        self._tried: set[str] = set()
        """Operations that were driven here and have not ended."""

    @property
    def settings(self) -> ExecutorSettings:
        """The limits this executor keeps."""
        return self._settings

    @property
    def agents(self) -> Agents:
        """The agents it calls."""
        return self._agents

    async def run(self) -> None:
        """Drive operations until cancelled; begins with those this server left unfinished when it ended."""
        await self._view.loaded()
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                for operation in list(self._view.operations()):
                    self.begin(operation.value, operation.revision)
                await asyncio.Event().wait()
            finally:
                self._group = None

    def begin(
        self, operation: OperationRecord, revision: int, *, request_id: str = "", accepted: bool = False
    ) -> None:
        """Drive the operation, unless it has ended, is driven already or is another server's.

        ``request_id`` is that of the call that began it, for the logs here and on the node. ``accepted``: this may be
        the moment of its acceptance.
        """
        mine = (
            not operation.done
            and operation.server_id == self._server_id
            and operation.id not in self._driven
            and operation.verb not in LED
        )
        # Before `run` there is nobody to drive it; `run` begins with all that are recorded.
        if mine and self._group is not None:
            driven = _Driven(
                asyncio.get_running_loop().create_future(),
                request_id or operation.request_id or operation.id,
                untried=accepted and operation.id not in self._tried,
            )
            self._tried.add(operation.id)
            self._driven[operation.id] = driven
            if operation.cancel_requested:
                driven.cancel.set_result(None)
            self._group.create_task(self._drive(operation.id, driven), name=f"drive-{operation.id}")
        self._waiters.settle(Versioned(operation, revision))

    def wake(self, operation_id: str) -> None:
        """A cancellation was asked for."""
        driven = self._driven.get(operation_id)
        if driven is not None and not driven.cancel.done():
            driven.cancel.set_result(None)

    def drives(self, operation_id: str) -> bool:
        """Whether this server is at work on it."""
        return operation_id in self._driven

    async def take_over(self, operation_id: str) -> None:
        """Drive an operation whose server is dead, or that is past its deadline; nothing where neither is so."""
        found = self._committer.find(keys.operation(operation_id))
        if found is None or operation_id in self._driven:
            return
        time_s = self._settings.time_for(found.value.verb, found.value.grace_period_s)
        decided = await self._committer.commit(
            lambda draft: outcomes.take_over(draft, operation_id, server_id=self._server_id, time_s=time_s)
        )
        if decided.value is not None:
            log.info("operation_taken_over", operation_id=operation_id, verb=decided.value.verb)
            self.begin(decided.value, decided.revision)

    def remove_leftover(self, instance_id: str) -> None:
        """Finish the removal of an instance that shall be gone and is held by no operation."""
        if self._group is not None and instance_id not in self._removing:
            self._removing.add(instance_id)
            self._group.create_task(self._remove_leftover(instance_id), name=f"remove-{instance_id}")

    def remove_old_copy(self, instance_id: str) -> None:
        """Finish what a move that has ended left on a node that did not answer then."""
        if self._group is not None and instance_id not in self._removing:
            self._removing.add(instance_id)
            self._group.create_task(self._remove_old_copy(instance_id), name=f"clean-{instance_id}")

    # --- one operation

    async def _drive(self, operation_id: str, driven: _Driven) -> None:
        try:
            async with self._slots:
                await self._drive_to_end(operation_id, driven)
            self._tried.discard(operation_id)
        except Conflict as exc:
            if exc.reason != outcomes.TAKEN_OVER:
                raise
            log.info("operation_let_go", operation_id=operation_id)
        except Exception:
            # A defect must not take down the other operations; past its deadline the operation is driven anew.
            log.exception("operation_drive_failed", operation_id=operation_id)
        finally:
            del self._driven[operation_id]
            driven.cancel.cancel()

    async def _drive_to_end(self, operation_id: str, driven: _Driven) -> None:
        operation = self._committer.find(keys.operation(operation_id))
        if operation is None or operation.value.done:
            return
        record = operation.value
        instance = self._committer.find(keys.instance(record.object_id))
        if instance is None or instance.value.operation_id != operation_id:
            lost = Internal(f"operation {operation_id} has lost its instance {record.object_name}")
            await self._end(lambda d: outcomes.fail(d, operation_id, server_id=self._server_id, error=lost))
            return
        about = {
            "operation_id": operation_id,
            "verb": record.verb,
            "instance_id": record.object_id,
            "request_id": driven.request_id,
        }
        if record.verb == "move":
            await self._mover.drive(operation_id, driven.cancel, request_id=driven.request_id)
            return
        try:
            reply = await self._perform(record, instance.value, driven)
            if not await self._alone(instance.value, driven.request_id, verb=record.verb):
                raise node_unreachable(copy_elsewhere(instance.value), None)
        except HypervisorError as exc:
            if exc.reason == outcomes.TAKEN_OVER:
                raise
            log.warning("operation_failed", reason=exc.reason, error=str(exc), **about)
            await self._end_failed(record, instance.value, exc, driven)
        else:
            if isinstance(reply, Observation):
                lane = Lane.PLACEMENTS if record.verb == "update" else Lane.RECORDS
                await self._end(
                    lambda d: outcomes.succeed(d, operation_id, reply, server_id=self._server_id), lane=lane
                )
            else:
                await self._end(
                    lambda d: outcomes.remove(d, operation_id, server_id=self._server_id),
                    lane=Lane.PLACEMENTS,
                )
            log.info("operation_succeeded", **about)

    async def _perform(
        self, operation: OperationRecord, instance: Instance, driven: _Driven
    ) -> Observation | bool:
        """The agent's answer; calls again while the node cannot be reached, until the operation's time is over."""
        deadline = instance.transition_deadline or self._clock.now()
        delays = self._settings.backoff.delays(self._rng)
        while True:
            node = self._committer.find(keys.node(instance.node_id))
            if node is None or node.value.status is NodeStatus.OFFLINE:
                raise node_unreachable(instance, node.value if node else None)
            left_s = (deadline - self._clock.now()).total_seconds()
            if left_s <= 0:
                raise node_unreachable(instance, node.value)
            if driven.cancel.done():
                raise _cancelled(operation)
            context = CallContext(driven.request_id, left_s)
            untried, driven.untried = driven.untried, False
            try:
                return await self._attend(
                    _call(self._agents.agent(node.value), operation, instance, context, images=self._images),
                    operation,
                    driven,
                )
            except HypervisorError as exc:
                driven.untried = untried and outcomes.nothing_begun(exc)
                if not isinstance(exc, Unavailable) or exc.reason != "NODE_UNREACHABLE":
                    raise
                log.warning(
                    "agent_unreachable", operation_id=operation.id, node=node.value.hostname, error=str(exc)
                )
            await self._attend(self._clock.sleep(next(delays)), operation, driven)

    async def _attend(self, work: Coroutine[Any, Any, T], operation: OperationRecord, driven: _Driven) -> T:
        """Await the work; show progress when it is slow; end it and raise Cancelled when that is asked for."""
        task = asyncio.create_task(work, name=f"agent-call-{operation.id}")
        either: set[asyncio.Future[Any]] = {task, driven.cancel}
        try:
            ended, _ = await asyncio.wait(
                either, timeout=self._settings.slow_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not ended:
                await self._show_progress(operation)
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _cancelled(operation)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _show_progress(self, operation: OperationRecord) -> None:
        message = f"waiting for the node to {operation.verb} it"
        try:
            await self._committer.commit(
                lambda d: outcomes.progress(
                    d, operation.id, server_id=self._server_id, message=message, percent=50
                )
            )
        except Conflict:
            raise
        except HypervisorError as exc:
            # Progress is a courtesy: the work goes on without.
            log.warning("progress_not_recorded", operation_id=operation.id, error=str(exc))

    async def _end_failed(
        self, operation: OperationRecord, instance: Instance, error: HypervisorError, driven: _Driven
    ) -> None:
        cleaning = CallContext(driven.request_id, self._settings.cleanup_s)
        operation_id, server_id = operation.id, self._server_id
        if operation.verb == "create":
            if await self._cleaned_up(operation, instance, cleaning) or driven.untried:
                await self._end(
                    lambda d: outcomes.remove(d, operation_id, server_id=server_id, error=error),
                    lane=Lane.PLACEMENTS,
                )
            else:
                await self._end(
                    lambda d: outcomes.cleanup_later(d, operation_id, server_id=server_id, error=error)
                )
        elif operation.verb == "delete" and outcomes.unclear(error):
            await self._end(
                lambda d: outcomes.cleanup_later(d, operation_id, server_id=server_id, error=error)
            )
        elif isinstance(error, Cancelled):
            await self._undo_start(operation, instance, error, cleaning)
        else:
            lane = Lane.PLACEMENTS if operation.verb == "update" else Lane.RECORDS
            await self._end(
                lambda d: outcomes.fail(
                    d, operation_id, server_id=server_id, error=error, tried=not driven.untried
                ),
                lane=lane,
            )

    async def _cleaned_up(self, operation: OperationRecord, instance: Instance, context: CallContext) -> bool:
        """Whether the node confirms that nothing of a failed create is left."""
        agent = self._reachable_agent(instance)
        if agent is None:
            return False
        try:
            await agent.delete(instance, context, grace_s=0.0)
        except HypervisorError as exc:
            log.warning("create_cleanup_failed", operation_id=operation.id, reason=exc.reason, error=str(exc))
            return False
        return True

    async def _undo_start(
        self, operation: OperationRecord, instance: Instance, error: HypervisorError, context: CallContext
    ) -> None:
        agent = self._reachable_agent(instance)
        try:
            if agent is None:
                raise node_unreachable(instance, None)
            reply = await agent.stop(instance, context, grace_s=0.0)
        except HypervisorError as exc:
            log.warning("start_undo_failed", operation_id=operation.id, reason=exc.reason, error=str(exc))
            await self._end(lambda d: outcomes.fail(d, operation.id, server_id=self._server_id, error=error))
            return
        await self._end(
            lambda d: outcomes.succeed(d, operation.id, reply, server_id=self._server_id, error=error)
        )

    async def _alone(self, instance: Instance, request_id: str, *, verb: str) -> bool:
        """Of an instance that is removed: whether nothing of it is left elsewhere, by a move, either."""
        if verb != "delete" or instance.move is None:
            return True
        return await self._mover.remove_copy(instance, request_id=request_id)

    async def _end(
        self, decision: Decision[OperationRecord], *, lane: Lane = Lane.RECORDS
    ) -> OperationRecord:
        """Commit how the operation ended; the agent's work is done, so this goes on until the store takes it."""

        def told(operation: OperationRecord, revision: int) -> None:
            self._waiters.settle(Versioned(operation, revision))

        return await self._persist(lambda: self._committer.commit(decision, then=told, lane=lane))

    async def _persist(self, commit: Callable[[], Awaitable[Decided[T]]]) -> T:
        for delay in self._settings.backoff.delays(self._rng):
            try:
                return (await commit()).value
            except HypervisorError as exc:
                passes = isinstance(exc, Unavailable | DeadlineExceeded) or exc.retry_after_s is not None
                if not passes:  # not ours to record any more, or a defect; a full disk, for one, passes
                    raise
                log.warning("outcome_not_recorded_yet", reason=exc.reason, error=str(exc))
                await self._clock.sleep(max(delay, exc.retry_after_s or 0.0))
        raise AssertionError("the delays never end")

    def _reachable_agent(self, instance: Instance) -> Agent | None:
        node = self._committer.find(keys.node(instance.node_id))
        if node is None or node.value.status is NodeStatus.OFFLINE:
            return None
        return self._agents.agent(node.value)

    # --- what operations left behind

    async def _remove_leftover(self, instance_id: str) -> None:
        try:
            found = self._committer.find(keys.instance(instance_id))
            agent = None if found is None else self._reachable_agent(found.value)
            if found is None or agent is None:
                return
            context = CallContext(f"remove-{instance_id}", self._settings.delete_s)
            await agent.delete(found.value, context, grace_s=0.0)
            if not await self._alone(found.value, context.request_id, verb="delete"):
                return
            await self._committer.commit(
                lambda draft: _release_leftover(draft, instance_id), lane=Lane.PLACEMENTS
            )
            log.info("leftover_removed", instance_id=instance_id)
        except HypervisorError as exc:
            # The reconciler asks again.
            log.warning("leftover_not_removed", instance_id=instance_id, reason=exc.reason, error=str(exc))
        except Exception:
            log.exception("leftover_not_removed", instance_id=instance_id)
        finally:
            self._removing.discard(instance_id)

    async def _remove_old_copy(self, instance_id: str) -> None:
        try:
            found = self._committer.find(keys.instance(instance_id))
            move = None if found is None else found.value.move
            if found is None or move is None or found.value.operation_id:
                return
            if await self._mover.remove_copy(found.value, request_id=f"clean-{instance_id}"):
                await self._committer.commit(
                    lambda draft: forget_leftover(draft, instance_id, started_at=move.started_at),
                    lane=Lane.PLACEMENTS,
                )
                log.info("old_copy_removed", instance_id=instance_id)
        except HypervisorError as exc:
            # The reconciler asks again.
            log.warning("old_copy_not_removed", instance_id=instance_id, reason=exc.reason, error=str(exc))
        except Exception:
            log.exception("old_copy_not_removed", instance_id=instance_id)
        finally:
            self._removing.discard(instance_id)


def _release_leftover(draft: Draft, instance_id: str) -> None:
    found = draft.get(keys.instance(instance_id))
    if found is not None and found.value.desired is DesiredState.DELETED and not found.value.operation_id:
        release(draft, found.value)


async def _call(
    agent: Agent,
    operation: OperationRecord,
    instance: Instance,
    context: CallContext,
    *,
    images: ImagesOf,
) -> Observation | bool:
    grace_s = operation.grace_period_s or 0.0
    match operation.verb:
        case "create" | "recreate" | "replace" | "adopt":
            start = instance.desired is DesiredState.RUNNING
            return await agent.create(instance, context, start=start, images=images(instance))
        case "start":
            return await agent.start(instance, context)
        case "stop":
            return await agent.stop(instance, context, grace_s=grace_s)
        case "restart":
            return await agent.restart(instance, context, grace_s=grace_s)
        case "delete":
            return await agent.delete(instance, context, grace_s=grace_s)
        case "update" if operation.sizes is not None:
            return await agent.update(instance, context, sizes=operation.sizes)
        case "pause":
            return await agent.pause(instance, context)
        case "resume":
            return await agent.resume(instance, context)
        case "suspend":
            return await agent.suspend(instance, context)
        case "create-snapshot":
            return await agent.create_snapshot(
                instance, context, name=operation.snapshot, kind=operation.snapshot_kind
            )
        case "restore-snapshot":
            return await agent.restore_snapshot(instance, context, name=operation.snapshot)
        case "delete-snapshot":
            return await agent.delete_snapshot(instance, context, name=operation.snapshot)
        case verb:
            raise Internal(f"operation {operation.id} has a verb no executor knows: {verb}")


def _cancelled(operation: OperationRecord) -> Cancelled:
    return Cancelled(
        f"the {operation.verb} of {operation.object_name} was cancelled",
        reason="OPERATION_CANCELLED",
        metadata={"operation_id": operation.id},
    )
