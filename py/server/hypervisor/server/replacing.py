"""Placing an instance anew: on another node with its epoch raised, or started again where it is.

:func:`place_elsewhere` is the decision, for whoever knows that no copy of the instance may run any more where it was:
the reconciler after a node was lost and fenced itself, an operator who says that it is dead, a drain that has stopped
it. What then drives it is an operation of the verb ``replace``, which makes the instance on its new node as a create
does, but fails without removing it.
"""

from collections.abc import Callable
from datetime import datetime

from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import Conflict, ResourceExhausted
from hypervisor.core.ids import IdSource
from hypervisor.core.model import Instance, OperationRecord
from hypervisor.core.states import DesiredState, InstanceStatus
from hypervisor.server import keys
from hypervisor.server.committer import Decided, GroupCommitter, Lane
from hypervisor.server.drafts import Batch, Draft
from hypervisor.server.executor import OperationExecutor
from hypervisor.server.placement import Placer, give_back, order_of
from hypervisor.server.placement_terms import UNREGISTERED, terms_to_enter
from hypervisor.server.services import InstanceRef, Kind
from hypervisor.server.verbs import VERBS, begin
from hypervisor.server.view import StoreView

__all__ = ["Check", "Replacer", "place_elsewhere"]

Check = Callable[[Draft, Instance], str | None]
"""Whether the instance, as it is now, is still to be placed anew: why (a sentence), or None. It reads what it decides
on with ``Draft.get``, so that the commit fails if that changes."""


def place_elsewhere(
    draft: Draft,
    placer: Placer,
    instance: Instance,
    *,
    operation: OperationRecord,
    deadline: datetime,
    reason: str,
    message: str,
    run: bool,
    may_stay: bool = False,
) -> OperationRecord:
    """Move the instance's reservation and record to another node, with its epoch raised, held by the operation.

    ``run``: whether the new copy is to be started. The caller has made sure that the old one does not run, or will have
    ended before anybody can have read this. ``may_stay``: where no other node has room, on the same one. The instance
    has no move under way. Raises what ``Placer.reserve_elsewhere`` raises.
    """
    node_id, placement = instance.node_id, instance.placement
    try:
        node_id, placement = placer.reserve_elsewhere(draft, instance, epoch=instance.next_epoch)
        give_back(draft, instance.node_id, instance.holds)
    except ResourceExhausted:
        if not may_stay:
            raise
    operation = structs.replace(operation, node_id=node_id)
    draft.put(
        keys.instance(instance.id),
        structs.replace(
            instance,
            node_id=node_id,
            epoch=instance.next_epoch,
            last_epoch=0,
            status=InstanceStatus.SCHEDULED,
            status_reason=reason,
            status_message=message,
            desired=instance.desired if run else DesiredState.STOPPED,
            operation_id=operation.id,
            transition_deadline=deadline,
            observed_sequence=0,
            runtime="",
            runtime_reason="",
            placement=placement,
            resizing=None,
            lost=None if instance.lost is None else structs.replace(instance.lost, waiting=""),
            updated_at=draft.now,
        ),
    )
    draft.create(keys.operation(operation.id), operation)
    return operation


class Replacer:
    """Commits such decisions and has them driven."""

    def __init__(
        self,
        placer: Placer,
        view: StoreView,
        committer: GroupCommitter,
        executor: OperationExecutor,
        clock: Clock,
        *,
        new_id: IdSource,
        server_id: str,
    ) -> None:
        self._placer = placer
        self._view = view
        self._committer = committer
        self._executor = executor
        self._clock = clock
        self._new_id = new_id
        self._server_id = server_id

    def preview(self, instance: Instance) -> str:
        """Id of the node that it would be placed on now. Raises what ``Placer.choose_elsewhere`` raises."""
        draft = Batch(self._committer.known, now=self._clock.now()).draft()
        seed = f"{instance.id}/{instance.next_epoch}"
        return self._placer.choose_elsewhere(draft, instance, seed=seed).node_id

    async def replace(
        self,
        instance: Instance,
        check: Check,
        *,
        reason: str,
        run: bool,
        principal: str,
        may_stay: bool = False,
    ) -> OperationRecord | None:
        """Place it elsewhere and begin to make it there, if ``check`` still says so; None if not.

        Raises ResourceExhausted (``NO_NODE_FITS``) and what else ``Placer.reserve_elsewhere`` raises.
        """
        operation = self._operation("replace", instance, principal=principal)
        deadline = self._executor.settings.deadline(self._clock.now(), "replace")
        await self._enter_terms(instance)

        def decide(draft: Draft) -> OperationRecord | None:
            found = draft.get(keys.instance(instance.id))
            why = None if found is None or found.value.operation_id else check(draft, found.value)
            if found is None or why is None:
                return None
            return place_elsewhere(
                draft,
                self._placer,
                found.value,
                operation=operation,
                deadline=deadline,
                reason=reason,
                message=why,
                run=run,
                may_stay=may_stay,
            )

        try:
            decided = await self._committer.commit(decide, then=self._begun, lane=Lane.PLACEMENTS)
        except Conflict as exc:
            if exc.reason != UNREGISTERED:
                raise
            return None  # the next look enters the terms anew
        return decided.value

    async def start(self, instance: Instance, check: Check, *, principal: str) -> OperationRecord | None:
        """Start it again on its node, if ``check`` still says so; None if not."""
        operation = self._operation("start", instance, principal=principal)
        deadline = self._executor.settings.deadline(self._clock.now(), "start")

        def decide(draft: Draft) -> OperationRecord | None:
            found = draft.get(keys.instance(instance.id))
            if found is None or found.value.operation_id or check(draft, found.value) is None:
                return None
            begun = begin(
                draft, VERBS["start"], InstanceRef(instance.id), operation=operation, deadline=deadline
            )
            held = draft.get(keys.instance(instance.id))
            assert held is not None
            draft.put(keys.instance(instance.id), structs.replace(held.value, lost=None))
            return begun

        decided: Decided[OperationRecord | None] = await self._committer.commit(decide, then=self._begun)
        return decided.value

    def _begun(self, operation: OperationRecord | None, revision: int) -> None:
        if operation is not None:
            self._executor.begin(operation, revision)

    def _operation(self, verb: str, instance: Instance, *, principal: str) -> OperationRecord:
        return OperationRecord(
            id=self._new_id("op"),
            verb=verb,
            object_kind=Kind.INSTANCE.value,
            object_id=instance.id,
            object_name=instance.name,
            principal=principal,
            started_at=self._clock.now(),
            project=instance.project,
            server_id=self._server_id,
        )

    async def _enter_terms(self, instance: Instance) -> None:
        """See ``placement_terms.py``."""
        order = order_of(instance)
        wanted = terms_to_enter(order)
        register = self._view.find(keys.PLACEMENT_TERMS) if wanted else None
        if not wanted or (register is not None and all(one in register.value.terms for one in wanted)):
            return
        entered = await self._committer.commit(
            lambda draft: self._placer.enter_terms(draft, order), lane=Lane.PLACEMENTS
        )
        await self._view.wait_revision(entered.revision)
