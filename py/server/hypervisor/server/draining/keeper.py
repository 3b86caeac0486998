"""The leader's work on drains: looks at each that goes on, takes on record what came of its moves, and begins the next.

Whatever it begins is an operation of its own that any server can finish, and what is left to do is read off the
instances, so a leader may die at any point: the next one goes on from the records. Every commit is fenced.
"""

import asyncio
from functools import partial

import structlog
from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import Cancelled, Conflict, FailedPrecondition, HypervisorError
from hypervisor.core.model import OperationRecord
from hypervisor.core.states import OperationState
from hypervisor.server import keys
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Draft
from hypervisor.server.draining.records import DrainRecord
from hypervisor.server.draining.stepping import Situation, StartMove, Step, StopByForce, failed_attempt, step
from hypervisor.server.executor import OperationExecutor
from hypervisor.server.moves import MoveService
from hypervisor.server.operations import OperationService
from hypervisor.server.outcomes import end_operation
from hypervisor.server.services import Caller, ClusterChange, InstanceRef, Kind, Mutation, Versioned
from hypervisor.server.store.storage import Compare
from hypervisor.server.verbs import VERBS, begin
from hypervisor.server.view import StoreView

__all__ = ["DrainKeeper"]

log = structlog.get_logger(__name__)


class DrainKeeper:
    """See the module's docstring. ``interval_s``: the longest between two looks at a drain that goes on."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        executor: OperationExecutor,
        operations: OperationService,
        moves: MoveService,
        clock: Clock,
        *,
        interval_s: float = 1.0,
    ) -> None:
        self._view = view
        self._committer = committer
        self._executor = executor
        self._operations = operations
        self._moves = moves
        self._clock = clock
        self._interval_s = interval_s
        self._changed = asyncio.Event()
        view.add_listener(self._notice)

    def situation(self, drain: DrainRecord) -> Situation:
        """The drain and the cluster as this server sees them."""
        view = self._view
        operations = {}
        for operation_id in drain.moving.values():
            found = view.operation(operation_id)
            if found is not None:
                operations[operation_id] = found.value
        own = view.operation(drain.operation_id)
        return Situation(
            now=self._clock.now(),
            drain=drain,
            nodes={found.value.id: found.value for found in view.nodes()},
            instances=[found.value for found in view.instances()],
            operations=operations,
            budgets=[found.value for found in view.budgets()],
            live_refused=self._moves.live.why_not,
            cancelled=own is not None and own.value.cancel_requested,
        )

    def look(self, drain: DrainRecord) -> Step:
        """What the drain would do now."""
        return step(self.situation(drain))

    async def run(self, fence: Compare) -> None:
        """Keep all drains going while this server leads."""
        await self._view.wait_revision(fence.mod_revision)
        while True:
            self._changed.clear()
            if not self._view.stale:
                for found in list(self._view.drains()):
                    if found.value.active:
                        await self._keep(found.value.node_id, fence)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
            # Changes come in swarms: look once for many.
            await self._clock.sleep(self._interval_s / 20)

    async def _keep(self, node_id: str, fence: Compare) -> None:
        """Begin one thing after another, each on a view that has the one before, until nothing is to be begun."""
        try:
            while await self._begin_next(node_id, fence):
                pass
        except HypervisorError as exc:
            # The next look decides anew.
            log.warning("drain_not_looked_at", node_id=node_id, reason=exc.reason, error=str(exc))

    async def _begin_next(self, node_id: str, fence: Compare) -> bool:
        found = self._view.drain(node_id)
        if found is None or not found.value.active:
            return False
        decided = self.look(found.value)
        if decided.drain != found.value:
            await self._record(found, decided.drain, fence)
            return decided.drain.active
        if not decided.actions:
            return False
        action = decided.actions[0]
        try:
            revision = await self._begin(found.value, action, fence)
        except HypervisorError as exc:
            if isinstance(exc, Conflict) and exc.reason in ("LEADERSHIP_LOST", _CHANGED):
                raise
            log.info(
                "drain_move_refused",
                node_id=node_id,
                instance_id=action.instance_id,
                reason=exc.reason,
                error=str(exc),
            )
            trouble = failed_attempt(
                found.value.troubles.get(action.instance_id), exc.message, exc.reason, now=self._clock.now()
            )
            noted = structs.replace(
                found.value, troubles={**found.value.troubles, action.instance_id: trouble}
            )
            await self._record(found, noted, fence)
        else:
            await self._view.wait_revision(revision)
        return True

    async def _record(self, found: Versioned[DrainRecord], changed: DrainRecord, fence: Compare) -> None:
        decided = await self._committer.commit(partial(_write, found=found, changed=changed, fence=fence))
        await self._view.wait_revision(decided.revision)
        if not changed.active:
            log.info(
                "drain_ended",
                node_id=changed.node_id,
                kind=changed.kind.value,
                state=changed.state.value,
                message=changed.message,
            )

    async def _begin(self, drain: DrainRecord, action: StartMove | StopByForce, fence: Compare) -> int:
        """Begin it, noted in the drain's record in the same transaction; returns the revision."""
        ref = InstanceRef(action.instance_id)
        mutation = Mutation(Caller(drain.principal, drain.operation_id), "", "")
        if isinstance(action, StartMove):
            begun = await self._moves.begin(
                ref,
                mutation,
                order=action.order,
                grace_s=drain.order.grace_s,
                also=partial(_note_begun, drain=drain, fence=fence),
            )
            return begun.revision
        opened = self._operations.open("stop", mutation, object_kind=Kind.INSTANCE, grace_s=0.0)
        deadline = self._executor.settings.deadline(self._clock.now(), "stop", grace_s=0.0)

        def stop(draft: Draft) -> OperationRecord:
            operation = begin(draft, VERBS["stop"], ref, operation=opened, deadline=deadline)
            _note_begun(draft, operation, drain=drain, fence=fence, stopped=1)
            return operation

        stopped = await self._committer.commit(stop, then=self._executor.begin)
        return stopped.revision

    def _notice(self, changes: tuple[ClusterChange, ...]) -> None:
        if any(change.kind is not Kind.INSTANCE or change.current is None for change in changes) or any(
            found.value.active for found in self._view.drains()
        ):
            self._changed.set()


_CHANGED = "DRAIN_CHANGED"


def _current(draft: Draft, drain: DrainRecord, fence: Compare) -> None:
    draft.guard(fence)
    found = draft.get(keys.drain(drain.node_id))
    if found is None or found.value != drain:
        raise Conflict("the drain has changed meanwhile: look again", reason=_CHANGED)


def _note_begun(
    draft: Draft, operation: OperationRecord, *, drain: DrainRecord, fence: Compare, stopped: int = 0
) -> None:
    """The drain has begun this operation; only if it is still as it was when that was decided."""
    _current(draft, drain, fence)
    own = draft.get(keys.operation(drain.operation_id))
    if own is not None and own.value.cancel_requested:
        raise Conflict("the drain is being cancelled", reason=_CHANGED)
    draft.put(
        keys.drain(drain.node_id),
        structs.replace(
            drain,
            moving={**drain.moving, operation.object_id: operation.id},
            stopped=drain.stopped + stopped,
        ),
    )


def _write(draft: Draft, *, found: Versioned[DrainRecord], changed: DrainRecord, fence: Compare) -> None:
    _current(draft, found.value, fence)
    draft.put(keys.drain(changed.node_id), changed)
    if changed.active:
        return
    own = draft.get(keys.operation(changed.operation_id))
    if own is None or own.value.done:
        return
    error: HypervisorError | None = None
    if changed.state is not OperationState.SUCCEEDED:
        made = Cancelled if changed.state is OperationState.CANCELLED else FailedPrecondition
        error = made(
            changed.message,
            reason="OPERATION_CANCELLED"
            if changed.state is OperationState.CANCELLED
            else f"{changed.kind.name}_INCOMPLETE",
            metadata={"node_id": changed.node_id},
        )
    draft.put(keys.operation(own.value.id), end_operation(own.value, error, now=draft.now))
