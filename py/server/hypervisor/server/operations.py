"""The history of mutating calls: finding operations, waiting for them, cancelling them. Implements ``Operations``."""

import asyncio
from collections.abc import Callable

import structlog
from msgspec import structs

from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, NotFound
from hypervisor.core.ids import IdSource, derived_id
from hypervisor.core.machines import SnapshotKind
from hypervisor.core.model import OperationRecord
from hypervisor.core.states import OperationState
from hypervisor.server import keys
from hypervisor.server.committer import Decided, GroupCommitter
from hypervisor.server.drafts import Draft
from hypervisor.server.failures import error_of
from hypervisor.server.placement import check_same_request
from hypervisor.server.services import Caller, ClusterChange, Kind, Mutation, Versioned
from hypervisor.server.verbs import CANCELLABLE
from hypervisor.server.view import StoreView

__all__ = ["OperationService", "Waiters"]

log = structlog.get_logger(__name__)


class Waiters:
    """Who waits for which operation to end; told by this server's own commits and by the view."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[Versioned[OperationRecord]]]] = {}

    def settle(self, operation: Versioned[OperationRecord]) -> None:
        """The operation ended: wake those who wait for it. Does nothing for one that goes on."""
        if not operation.value.done:
            return
        for future in self._waiting.pop(operation.value.id, ()):
            if not future.done():
                future.set_result(operation)

    async def wait(self, operation_id: str) -> Versioned[OperationRecord]:
        """Return the operation once it has ended (after this call)."""
        future: asyncio.Future[Versioned[OperationRecord]] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(operation_id, set()).add(future)
        try:
            return await future
        finally:
            waiting = self._waiting.get(operation_id)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._waiting[operation_id]


class OperationService:
    """See ``Operations`` for the contract. ``wake`` tells the executor to look at an operation it drives."""

    def __init__(
        self,
        view: StoreView,
        committer: GroupCommitter,
        clock: Clock,
        *,
        new_id: IdSource,
        server_id: str,
        waiters: Waiters,
        wake: Callable[[str], None],
    ) -> None:
        self._view = view
        self._committer = committer
        self._clock = clock
        self._new_id = new_id
        self._server_id = server_id
        self._waiters = waiters
        self._wake = wake
        view.add_listener(self._changed)

    def open(
        self,
        verb: str,
        mutation: Mutation,
        *,
        object_kind: str,
        object_id: str = "",
        object_name: str = "",
        project: str = "",
        grace_s: float | None = None,
        snapshot: str = "",
        snapshot_kind: SnapshotKind = SnapshotKind.FULL,
    ) -> OperationRecord:
        """A new operation, not recorded yet. Its id follows from caller and request_id where there is one.

        ``object_kind``: one of :class:`Kind`, or ``image``.
        """
        caller, request_id = mutation.caller, mutation.request_id
        return OperationRecord(
            id=derived_id("op", caller.principal, request_id) if request_id else self._new_id("op"),
            verb=verb,
            object_kind=str(object_kind),
            object_id=object_id,
            object_name=object_name,
            principal=caller.principal,
            started_at=self._clock.now(),
            project=project,
            request_id=request_id,
            payload_digest=mutation.payload_digest,
            server_id=self._server_id,
            grace_period_s=grace_s,
            snapshot=snapshot,
            snapshot_kind=snapshot_kind,
        )

    def repeated(self, draft: Draft, opened: OperationRecord) -> OperationRecord | None:
        """The operation that an earlier request with the same id began; refuses another payload."""
        known = draft.get(keys.operation(opened.id)) if opened.request_id else None
        if known is None:
            return None
        check_same_request(known.value, opened)
        return known.value

    def record_done(self, draft: Draft, opened: OperationRecord) -> OperationRecord:
        """Record an operation that ends in the commit it begins in."""
        done = structs.replace(
            opened, state=OperationState.SUCCEEDED, progress_percent=100, finished_at=draft.now
        )
        draft.put(keys.operation(done.id), done)
        return done

    async def conclude(self, decided: Decided[OperationRecord], *, wait: bool) -> Versioned[OperationRecord]:
        """What a mutating call returns: the operation as recorded, or with ``wait`` when it is done.

        Raises the error of an operation waited for that failed (metadata ``operation_id``).
        """
        operation = self._committer.find(keys.operation(decided.value.id))
        if operation is None:
            operation = Versioned(decided.value, decided.revision)
        if wait and not operation.value.done:
            operation = await self._waiters.wait(operation.value.id)
        if wait and operation.value.error is not None:
            raise error_of(operation.value.error, operation_id=operation.value.id)
        # The caller reads its own writes, also the objects that the answer shows.
        await self._view.wait_revision(operation.revision)
        return operation

    def get(self, operation: str) -> Versioned[OperationRecord]:
        """See ``Operations``. NotFound (``OPERATION_NOT_FOUND``)."""
        found = self._committer.find(keys.operation(operation))
        found = found or self._view.operation_of_request(operation)
        if found is None:
            raise NotFound(
                f"there is no operation with id or request_id {operation!r}: it was never begun, or it ended too "
                "long ago to be kept",
                reason="OPERATION_NOT_FOUND",
                metadata={"operation": operation},
            )
        return found

    async def wait(self, operation: str, *, timeout_s: float | None) -> Versioned[OperationRecord]:
        """See ``Operations``."""
        found = self.get(operation)
        if found.value.done:
            return found
        try:
            async with asyncio.timeout(timeout_s):
                return await self._waiters.wait(found.value.id)
        except TimeoutError:
            return self.get(found.value.id)

    async def cancel(self, operation: str, caller: Caller) -> Versioned[OperationRecord]:
        """See ``CancelOperation``: asks; who drives the operation ends it."""
        # Two callers may have used one request_id: the caller means its own.
        own = self._committer.find(keys.operation(derived_id("op", caller.principal, operation)))
        operation_id = (own or self.get(operation)).value.id

        def decide(draft: Draft) -> OperationRecord:
            found = draft.get(keys.operation(operation_id))
            if found is None:
                return self.get(operation_id).value
            _check_cancellable(found.value)
            if found.value.cancel_requested:
                return found.value
            asked = structs.replace(
                found.value, cancel_requested=True, progress_message=f"being cancelled by {caller.principal}"
            )
            draft.put(keys.operation(operation_id), asked)
            return asked

        decided = await self._committer.commit(decide, then=lambda _, __: self._wake(operation_id))
        log.info("operation_cancel_requested", operation_id=operation_id, principal=caller.principal)
        return self._committer.find(keys.operation(operation_id)) or Versioned(
            decided.value, decided.revision
        )

    def _changed(self, changes: tuple[ClusterChange, ...]) -> None:
        for change in changes:
            if change.kind is Kind.OPERATION and change.current is not None:
                operation = change.current
                assert isinstance(operation.value, OperationRecord)
                if operation.value.done:
                    self._waiters.settle(Versioned(operation.value, operation.revision))
                elif operation.value.cancel_requested:
                    self._wake(operation.value.id)


def _check_cancellable(operation: OperationRecord) -> None:
    if operation.done:
        raise FailedPrecondition(
            f"operation {operation.id} has ended ({operation.state.value}): there is nothing to cancel",
            reason="OPERATION_DONE",
            metadata={"operation_id": operation.id, "state": operation.state.value},
        )
    assert operation.state is OperationState.RUNNING
    if operation.verb not in CANCELLABLE:
        raise FailedPrecondition(
            f"a {operation.verb} cannot be undone: only {' and '.join(sorted(CANCELLABLE))} can be cancelled",
            reason="NOT_CANCELLABLE",
            metadata={"operation_id": operation.id, "verb": operation.verb},
        )
