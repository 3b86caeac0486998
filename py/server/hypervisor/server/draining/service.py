"""Draining nodes, bringing instances home, and disruption budgets: what the calls do. Implements ``Maintenance``."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import datetime, timedelta

import structlog
from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import Cancelled, FailedPrecondition, HypervisorError, NotFound, Unavailable
from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.core.states import NodeStatus, OperationState
from hypervisor.server import keys
from hypervisor.server.committer import Decided, GroupCommitter
from hypervisor.server.drafts import Batch, Draft
from hypervisor.server.draining.budgets import Standing, standing
from hypervisor.server.draining.keeper import DrainKeeper
from hypervisor.server.draining.planning import plan_drain
from hypervisor.server.draining.progress import DrainProgress, InstanceProgress, progress_of
from hypervisor.server.draining.records import Budget, DrainKind, DrainOrder, DrainRecord
from hypervisor.server.draining.stepping import to_be_moved
from hypervisor.server.node_changes import check_not_draining, node_not_found, record_cordon
from hypervisor.server.operations import OperationService
from hypervisor.server.placement import Placer
from hypervisor.server.services import Caller, Kind, Mutation, Versioned
from hypervisor.server.verbs import check_version
from hypervisor.server.view import StoreView

__all__ = ["MaintenanceService"]

_FORCING_S = 120.0
"""How long stopping by force may take."""
_STEP_S = 0.2
"""Shortest time between two steps that a watcher is shown."""

log = structlog.get_logger(__name__)


class MaintenanceService:
    """See ``Maintenance`` for the contract."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        operations: OperationService,
        keeper: DrainKeeper,
        placer: Placer,
        clock: Clock,
        *,
        resolve_node: Callable[[str], str],
    ) -> None:
        self._view = view
        self._committer = committer
        self._operations = operations
        self._keeper = keeper
        self._placer = placer
        self._clock = clock
        self._resolve_node = resolve_node

    # --- drains

    async def drain(
        self, node: str, mutation: Mutation, *, order: DrainOrder, reason: str, resource_version: int
    ) -> str:
        """See ``Maintenance``."""
        return await self._begin(
            DrainKind.DRAIN, node, mutation, order=order, reason=reason, resource_version=resource_version
        )

    async def restore(self, node: str, mutation: Mutation, *, order: DrainOrder) -> str:
        """See ``Maintenance``."""
        return await self._begin(
            DrainKind.RESTORE, node, mutation, order=order, reason="", resource_version=0
        )

    async def _begin(
        self,
        kind: DrainKind,
        node: str,
        mutation: Mutation,
        *,
        order: DrainOrder,
        reason: str,
        resource_version: int,
    ) -> str:
        opened = self._operations.open(kind.value, mutation, object_kind=Kind.NODE)
        node_id = self._resolve_node(node)
        total = len(self._left(kind, node_id))

        def decide(draft: Draft) -> OperationRecord:
            known = self._operations.repeated(draft, opened)
            if known is not None:
                return known
            found = draft.get(keys.node(node_id))
            if found is None:
                raise node_not_found(node)
            check_version(found, resource_version, what=f"node {found.value.hostname}")
            _check_drainable(draft, found.value)
            record = _record(kind, found.value, opened, order, now=draft.now, total=total)
            draft.put(keys.drain(node_id), record)
            if kind is DrainKind.DRAIN:
                why = reason or found.value.cordon_reason or f"drained by {opened.principal}"
                record_cordon(draft, found.value, schedulable=False, reason=why)
            else:
                record_cordon(draft, found.value, schedulable=True, reason="")
            begun = structs.replace(
                opened, object_id=node_id, object_name=found.value.hostname, node_id=node_id
            )
            draft.put(keys.operation(begun.id), begun)
            return begun

        decided: Decided[OperationRecord] = await self._committer.commit(decide)
        await self._view.wait_revision(decided.revision)
        log.info("drain_begun", kind=kind.value, node_id=node_id, principal=opened.principal)
        return decided.value.id

    def _left(self, kind: DrainKind, node_id: str) -> list[Instance]:
        probe = DrainRecord(
            node_id=node_id,
            kind=kind,
            operation_id="",
            principal="",
            order=DrainOrder(),
            started_at=self._clock.now(),
            give_up_at=self._clock.now(),
        )
        return to_be_moved(probe, (found.value for found in self._view.instances()))

    async def cancel(self, node: str, caller: Caller) -> Versioned[OperationRecord]:
        """See ``Maintenance``."""
        found = self._view.drain(self._resolve_node(node))
        if found is None or not found.value.active:
            raise FailedPrecondition(
                f"node {node} is not being drained: there is nothing to cancel",
                reason="NOT_DRAINING",
                metadata={"node": node},
            )
        return await self._operations.cancel(found.value.operation_id, caller)

    def state(self, node: str) -> DrainProgress | None:
        """See ``Maintenance``."""
        found = self._view.drain(self._resolve_node(node))
        return None if found is None else self._progress(found.value, {})

    async def watch(self, node: str, operation_id: str = "") -> AsyncGenerator[DrainProgress, None]:
        """See ``Maintenance``."""
        node_id = self._resolve_node(node)
        seen: dict[str, InstanceProgress] = {}
        before: DrainProgress | None = None
        async with aclosing(self._view.changes(after_revision=None)) as changes:
            while True:
                found = self._view.drain(node_id)
                if found is None:
                    raise NotFound(
                        f"node {node} was never drained", reason="DRAIN_NOT_FOUND", metadata={"node": node}
                    )
                operation_id = operation_id or found.value.operation_id
                if found.value.operation_id != operation_id:
                    # It has ended, and another has begun since.
                    self._end_of(operation_id)
                    return
                now = self._progress(found.value, seen)
                if now != before:
                    before = now
                    yield now
                    seen.update((one.instance_id, one) for one in now.instances)
                if not found.value.active:
                    _raise_failure(found.value)
                    return
                await anext(changes)
                await self._clock.sleep(_STEP_S)

    def _end_of(self, operation_id: str) -> None:
        ended = self._operations.get(operation_id).value
        if ended.error is not None:
            raise FailedPrecondition(
                ended.error.message, reason=ended.error.reason, metadata={"operation_id": operation_id}
            )

    def _progress(self, drain: DrainRecord, seen: dict[str, InstanceProgress]) -> DrainProgress:
        instances = [found.value for found in self._view.instances()]
        return progress_of(
            drain,
            self._keeper.look(drain),
            instances,
            seen=seen,
            current={instance.id: instance for instance in instances},
        )

    def plan(self, node: str, *, order: DrainOrder, kind: DrainKind = DrainKind.DRAIN) -> DrainProgress:
        """See ``Maintenance``."""
        node_id = self._resolve_node(node)
        now = self._clock.now()
        batch = Batch(self._committer.known, now=now)
        found = batch.draft().peek(keys.node(node_id))
        if found is None:
            raise node_not_found(node)
        _check_drainable(batch.draft(), found.value)
        left = self._left(kind, node_id)
        opened = self._operations.open(
            kind.value, Mutation(Caller("", ""), "", ""), object_kind=Kind.NODE, object_id=node_id
        )
        record = _record(kind, found.value, opened, order, now=now, total=len(left))
        return plan_drain(
            batch, self._placer, self._keeper.situation(structs.replace(record, operation_id="")), left
        )

    # --- budgets

    async def set_budget(self, budget: Budget) -> Budget:
        """See ``Maintenance``."""

        def decide(draft: Draft) -> Budget:
            key = keys.budget(budget.project, budget.name)
            found = draft.get(key)
            kept = budget if found is None else structs.replace(budget, created_at=found.value.created_at)
            draft.put(key, kept)
            return kept

        decided = await self._committer.commit(decide)
        await self._view.wait_revision(decided.revision)
        return decided.value

    async def delete_budget(self, project: str, name: str) -> None:
        """See ``Maintenance``."""

        def decide(draft: Draft) -> None:
            key = keys.budget(project, name)
            if draft.get(key) is None:
                raise NotFound(
                    f"project {project} has no budget {name}: see `budget list`",
                    reason="BUDGET_NOT_FOUND",
                    metadata={"budget": name, "project": project},
                )
            draft.delete(key)

        decided = await self._committer.commit(decide)
        await self._view.wait_revision(decided.revision)

    def budgets(self, project: str) -> list[tuple[Budget, Standing]]:
        """See ``Maintenance``."""
        instances = [found.value for found in self._view.instances()]
        found = [b.value for b in self._view.budgets() if project in ("", b.value.project)]
        found.sort(key=lambda b: (b.project, b.name))
        return [(budget, standing(budget, instances)) for budget in found]


def _check_drainable(draft: Draft, node: Node) -> None:
    if node.status is NodeStatus.OFFLINE:
        raise Unavailable(
            f"node {node.hostname} is offline, so nothing can be moved off it or onto it: bring it back first",
            reason="NODE_UNREACHABLE",
            metadata={"node": node.hostname, "node_id": node.id},
        )
    check_not_draining(draft, node)


def _record(
    kind: DrainKind, node: Node, operation: OperationRecord, order: DrainOrder, *, now: datetime, total: int
) -> DrainRecord:
    give_up_s = order.timeout_s
    force_at = None
    if order.force_after_s is not None:
        force_at = now + timedelta(seconds=order.force_after_s)
        give_up_s = max(give_up_s, order.force_after_s + _FORCING_S)
    return DrainRecord(
        node_id=node.id,
        kind=kind,
        operation_id=operation.id,
        principal=operation.principal,
        order=order,
        started_at=now,
        give_up_at=now + timedelta(seconds=give_up_s),
        force_at=force_at,
        total=total,
    )


def _raise_failure(drain: DrainRecord) -> None:
    """Raise what a drain that came to nothing ended with."""
    metadata = {"node_id": drain.node_id, "operation_id": drain.operation_id}
    error: HypervisorError
    if drain.state is OperationState.CANCELLED:
        error = Cancelled(drain.message, reason="OPERATION_CANCELLED", metadata=metadata)
    elif drain.state is OperationState.FAILED:
        error = FailedPrecondition(drain.message, reason=f"{drain.kind.name}_INCOMPLETE", metadata=metadata)
    else:
        return
    raise error
