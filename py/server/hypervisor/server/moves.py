"""Moving instances: what MoveInstance does, and what drains use. Implements ``Moves``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hypervisor.core.clock import Clock
from hypervisor.core.errors import Conflict
from hypervisor.core.model import OperationRecord
from hypervisor.server.committer import Decided, GroupCommitter, Lane
from hypervisor.server.drafts import Draft
from hypervisor.server.executor import OperationExecutor
from hypervisor.server.instances import enter_terms_of
from hypervisor.server.live_moves import LiveMoves
from hypervisor.server.moving import begin_move
from hypervisor.server.operations import OperationService
from hypervisor.server.placement import Placer, order_of
from hypervisor.server.placement_terms import UNREGISTERED
from hypervisor.server.services import InstanceRef, Kind, MoveOrder, Mutation, Versioned
from hypervisor.server.verbs import find_in_view
from hypervisor.server.view import StoreView

__all__ = ["MoveService"]


class MoveService:
    """See ``Moves`` for the contract."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        executor: OperationExecutor,
        operations: OperationService,
        placer: Placer,
        clock: Clock,
        *,
        live: LiveMoves,
        resolve_node: Callable[[str], str],
    ) -> None:
        self._view = view
        self._committer = committer
        self._executor = executor
        self._operations = operations
        self._placer = placer
        self._clock = clock
        self._live = live
        self._resolve_node = resolve_node

    @property
    def live(self) -> LiveMoves:
        """What moves instances while they run."""
        return self._live

    async def move(
        self, ref: InstanceRef, mutation: Mutation, *, order: MoveOrder, grace_s: float | None
    ) -> Versioned[OperationRecord]:
        if order.node:
            order = replace(order, node=self._resolve_node(order.node))
        decided = await self.begin(ref, mutation, order=order, grace_s=grace_s)
        return await self._operations.conclude(decided, wait=mutation.wait)

    async def begin(
        self,
        ref: InstanceRef,
        mutation: Mutation,
        *,
        order: MoveOrder,
        grace_s: float | None,
        also: Callable[[Draft, OperationRecord], None] = lambda draft, operation: None,
    ) -> Decided[OperationRecord]:
        """Record that the move begins, and have it driven. ``also``: what else is decided in that transaction."""
        operation = self._operations.open("move", mutation, object_kind=Kind.INSTANCE, grace_s=grace_s)
        while True:
            found = find_in_view(self._view, ref)
            await enter_terms_of(self._view, self._committer, self._placer, order_of(found.value))
            time_s = (grace_s or 0.0) + order.policy(found.value).healthy_s
            deadline = self._executor.settings.deadline(self._clock.now(), "move", grace_s=time_s)
            try:
                return await self._committer.commit(
                    partial(
                        begin_move,
                        placer=self._placer,
                        live=self._live,
                        ref=ref,
                        order=order,
                        operation=operation,
                        deadline=deadline,
                        also=also,
                    ),
                    then=partial(self._executor.begin, request_id=mutation.caller.request_id),
                    lane=Lane.PLACEMENTS,
                )
            except Conflict as exc:
                # Somebody has cleaned the register up meanwhile.
                if exc.reason != UNREGISTERED:
                    raise
