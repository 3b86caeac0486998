"""Instances: what the calls of ComputeService do. Implements ``Instances``; compute.proto has the rules."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import timedelta
from functools import partial

from hypervisor.core.clock import Clock
from hypervisor.core.consoles import ConsoleOptions, LogOptions, LogPiece
from hypervisor.core.errors import Conflict, FailedPrecondition, NotFound
from hypervisor.core.ids import IdSource
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Instance, InstanceStats, Node, OperationRecord
from hypervisor.core.states import ACTIVE, NodeStatus
from hypervisor.server import keys
from hypervisor.server.agents import Agents, CallContext
from hypervisor.server.committer import GroupCommitter, Lane
from hypervisor.server.drafts import Batch
from hypervisor.server.executor import OperationExecutor
from hypervisor.server.images.naming import fetch_allowance_s
from hypervisor.server.ledger import AllocationRules
from hypervisor.server.operations import OperationService
from hypervisor.server.placement import Placer
from hypervisor.server.placement_terms import UNREGISTERED, terms_to_enter
from hypervisor.server.resizing import SizeChange, begin_update
from hypervisor.server.services import (
    Caller,
    ConsoleSession,
    InstanceDraft,
    InstanceRef,
    Kind,
    Mutation,
    StopOptions,
    Versioned,
)
from hypervisor.server.verbs import (
    VERBS,
    begin,
    check_capability,
    find_in_view,
    node_unreachable,
)
from hypervisor.server.view import StoreView

__all__ = ["InstanceService", "check_project", "enter_terms_of"]

_ONLY_PROJECT = "default"
_STATS_TIMEOUT_S = 10.0
_CONSOLE_TIMEOUT_S = 10.0
_SNAPSHOTS_TIMEOUT_S = 10.0


class InstanceService:
    """See ``Instances`` for the contract."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        executor: OperationExecutor,
        operations: OperationService,
        placer: Placer,
        agents: Agents,
        clock: Clock,
        *,
        allocation: AllocationRules,
        new_id: IdSource,
        last_stats: Callable[[str], InstanceStats | None],
    ) -> None:
        self._view = view
        self._committer = committer
        self._executor = executor
        self._operations = operations
        self._placer = placer
        self._agents = agents
        self._clock = clock
        self._allocation = allocation
        self._new_id = new_id
        self._last_stats = last_stats

    async def create(self, draft: InstanceDraft, mutation: Mutation) -> Versioned[OperationRecord]:
        check_project(draft.project)
        operation = self._operations.open(
            "create",
            mutation,
            object_kind=Kind.INSTANCE,
            object_id=self._new_id("i"),
            object_name=draft.name,
            project=draft.project,
        )
        deadline = self._executor.settings.deadline(self._clock.now(), "create")
        deadline += timedelta(seconds=fetch_allowance_s(self._committer.known, draft))
        while True:
            await enter_terms_of(self._view, self._committer, self._placer, draft)
            try:
                decided = await self._committer.commit(
                    lambda d: self._placer.reserve(d, draft, operation=operation, deadline=deadline),
                    then=partial(self._executor.begin, request_id=mutation.caller.request_id, accepted=True),
                    lane=Lane.PLACEMENTS,
                )
            except Conflict as exc:
                # Somebody has cleaned the register up meanwhile.
                if exc.reason != UNREGISTERED:
                    raise
            else:
                return await self._operations.conclude(decided, wait=mutation.wait)

    async def plan(self, draft: InstanceDraft) -> Instance:
        check_project(draft.project)
        batch = Batch(self._committer.known, now=self._clock.now())
        return self._placer.preview(batch.draft(), draft)

    async def start(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]:
        return await self._begin("start", ref, mutation)

    async def stop(
        self, ref: InstanceRef, mutation: Mutation, *, options: StopOptions
    ) -> Versioned[OperationRecord]:
        return await self._begin("stop", ref, mutation, grace_s=options.grace_s)

    async def restart(
        self, ref: InstanceRef, mutation: Mutation, *, options: StopOptions
    ) -> Versioned[OperationRecord]:
        return await self._begin("restart", ref, mutation, grace_s=options.grace_s)

    async def delete(
        self, ref: InstanceRef, mutation: Mutation, *, options: StopOptions, force: bool
    ) -> Versioned[OperationRecord]:
        return await self._begin("delete", ref, mutation, grace_s=options.grace_s, force=force)

    async def update(
        self, ref: InstanceRef, mutation: Mutation, *, cpu_millis: int | None, memory_mb: int | None
    ) -> Versioned[OperationRecord]:
        operation = self._operations.open("update", mutation, object_kind=Kind.INSTANCE)
        deadline = self._executor.settings.deadline(self._clock.now(), "update")
        change = SizeChange(cpu_millis, memory_mb)
        decided = await self._committer.commit(
            lambda d: begin_update(d, self._allocation, ref, change, operation=operation, deadline=deadline),
            then=partial(self._executor.begin, request_id=mutation.caller.request_id, accepted=True),
            lane=Lane.PLACEMENTS,
        )
        return await self._operations.conclude(decided, wait=mutation.wait)

    async def pause(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]:
        return await self._begin("pause", ref, mutation)

    async def resume(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]:
        return await self._begin("resume", ref, mutation)

    async def suspend(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]:
        return await self._begin("suspend", ref, mutation)

    async def create_snapshot(
        self, ref: InstanceRef, mutation: Mutation, *, name: str, kind: SnapshotKind
    ) -> Versioned[OperationRecord]:
        return await self._begin("create-snapshot", ref, mutation, snapshot=name, snapshot_kind=kind)

    async def restore_snapshot(
        self, ref: InstanceRef, mutation: Mutation, *, name: str
    ) -> Versioned[OperationRecord]:
        return await self._begin("restore-snapshot", ref, mutation, snapshot=name)

    async def delete_snapshot(
        self, ref: InstanceRef, mutation: Mutation, *, name: str
    ) -> Versioned[OperationRecord]:
        return await self._begin("delete-snapshot", ref, mutation, snapshot=name)

    async def snapshots(self, ref: InstanceRef, caller: Caller) -> tuple[Snapshot, ...]:
        instance, node = self._placed(ref)
        check_capability(instance, node, "snapshot")
        context = CallContext(caller.request_id, _SNAPSHOTS_TIMEOUT_S)
        return await self._agents.agent(node).list_snapshots(instance, context)

    async def _begin(
        self,
        verb: str,
        ref: InstanceRef,
        mutation: Mutation,
        *,
        grace_s: float | None = None,
        force: bool = False,
        snapshot: str = "",
        snapshot_kind: SnapshotKind = SnapshotKind.FULL,
    ) -> Versioned[OperationRecord]:
        operation = self._operations.open(
            verb,
            mutation,
            object_kind=Kind.INSTANCE,
            grace_s=grace_s,
            snapshot=snapshot,
            snapshot_kind=snapshot_kind,
        )
        deadline = self._executor.settings.deadline(self._clock.now(), verb, grace_s=grace_s)
        decided = await self._committer.commit(
            lambda d: begin(d, VERBS[verb], ref, operation=operation, deadline=deadline, force=force),
            then=partial(self._executor.begin, request_id=mutation.caller.request_id, accepted=True),
        )
        return await self._operations.conclude(decided, wait=mutation.wait)

    def resolve(self, ref: InstanceRef) -> Versioned[Instance]:
        return find_in_view(self._view, ref)

    async def stats(self, ref: InstanceRef, caller: Caller) -> InstanceStats:
        instance, node = self._running(ref, "stats")
        context = CallContext(caller.request_id, _STATS_TIMEOUT_S)
        return await self._agents.agent(node).stats(instance.id, context)

    async def watch_stats(
        self, ref: InstanceRef, caller: Caller, *, interval_s: float, history_s: float
    ) -> AsyncGenerator[InstanceStats, None]:
        instance, node = self._running(ref, "stats")
        context = CallContext(caller.request_id, _STATS_TIMEOUT_S)
        samples = self._agents.agent(node).watch_stats(
            instance.id, context, interval_s=interval_s, history_s=history_s
        )
        async with aclosing(samples):
            async for sample in samples:
                yield sample

    def last_stats(self, instance_id: str) -> InstanceStats | None:
        return self._last_stats(instance_id)

    async def attach_console(
        self,
        ref: InstanceRef,
        caller: Caller,
        options: ConsoleOptions,
    ) -> ConsoleSession:
        instance, node = self._running(ref, "console")
        return await self._agents.agent(node).attach_console(
            instance.id,
            CallContext(caller.request_id, _CONSOLE_TIMEOUT_S),
            options,
        )

    async def logs(
        self, ref: InstanceRef, caller: Caller, options: LogOptions
    ) -> AsyncGenerator[LogPiece, None]:
        instance, node = self._placed(ref)
        context = CallContext(caller.request_id, _CONSOLE_TIMEOUT_S)
        # Closed with this generator, so that the agent does not go on for a caller who has left.
        async with aclosing(self._agents.agent(node).logs(instance.id, context, options)) as pieces:
            async for piece in pieces:
                yield piece

    def _placed(self, ref: InstanceRef) -> tuple[Instance, Node]:
        """The instance and its node, which lives; the instance may be in any state."""
        instance = self.resolve(ref).value
        if not instance.node_id:
            raise FailedPrecondition(
                f"instance {instance.name} has no node yet: try again once it is placed",
                reason="NOT_PLACED",
                metadata={"instance_id": instance.id, "status": instance.status.value},
            )
        node = self._committer.find(keys.node(instance.node_id))
        if node is None or node.value.status is NodeStatus.OFFLINE:
            raise node_unreachable(instance, node.value if node else None)
        return instance, node.value

    def _running(self, ref: InstanceRef, verb: str) -> tuple[Instance, Node]:
        """The instance and its node, for what only a running instance on a living node has."""
        instance = self.resolve(ref).value
        node = self._committer.find(keys.node(instance.node_id))
        if node is None or node.value.status is NodeStatus.OFFLINE:
            raise node_unreachable(instance, node.value if node else None)
        check_capability(instance, node.value, verb)
        if instance.status not in ACTIVE:
            raise FailedPrecondition(
                f"instance {instance.name} is {instance.status.value}: start it first",
                reason="NOT_RUNNING",
                metadata={"instance_id": instance.id, "status": instance.status.value},
            )
        return instance, node.value


async def enter_terms_of(
    view: StoreView, committer: GroupCommitter, placer: Placer, draft: InstanceDraft
) -> None:
    """See ``placement_terms.py``: the view is to have seen the register with the terms in it."""
    wanted = terms_to_enter(draft)
    register = view.find(keys.PLACEMENT_TERMS) if wanted else None
    if not wanted or (register is not None and all(one in register.value.terms for one in wanted)):
        return
    entered = await committer.commit(lambda d: placer.enter_terms(d, draft), lane=Lane.PLACEMENTS)
    await view.wait_revision(entered.revision)


def check_project(project: str) -> None:
    """Instances live in projects that exist; this version has one."""
    if project != _ONLY_PROJECT:
        raise NotFound(
            f"there is no project {project}: this version has {_ONLY_PROJECT} only",
            reason="PROJECT_NOT_FOUND",
            metadata={"project": project},
        )
