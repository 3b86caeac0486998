"""How an operation ends in the records: pure decisions, each one commit of the instance and the operation together.

All of them look first whether this server still drives the operation: one that was taken over by another server, or
has ended, is left alone (``Conflict``, reason ``OPERATION_TAKEN_OVER``).
"""

from datetime import datetime, timedelta

from msgspec import structs

from hypervisor.core.errors import Cancelled, Conflict, DeadlineExceeded, HypervisorError, Unavailable
from hypervisor.core.model import Instance, Observation, OperationRecord
from hypervisor.core.states import DesiredState, InstanceStatus, OperationState, can_move
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.failures import record_of
from hypervisor.server.observations import settle
from hypervisor.server.placement import release
from hypervisor.server.resizing import end_update

__all__ = [
    "TAKEN_OVER",
    "cleanup_later",
    "driven_operation",
    "end_operation",
    "fail",
    "nothing_begun",
    "progress",
    "remove",
    "succeed",
    "take_over",
    "unclear",
]

TAKEN_OVER = "OPERATION_TAKEN_OVER"

_NOTHING_BEGUN = frozenset({"DRIVER_UNAVAILABLE", "JOURNAL_FULL", "CAPABILITY_MISSING"})
_ENDS = frozenset({"stop", "suspend"})
"""Verbs that end a run and, where they come to nothing, leave it."""
_WANTED = {
    InstanceStatus.RUNNING: DesiredState.RUNNING,
    InstanceStatus.PAUSED: DesiredState.PAUSED,
    InstanceStatus.STOPPED: DesiredState.STOPPED,
}
_FAILED_REASONS = {
    "replace": "REPLACE_FAILED",
    "start": "START_FAILED",
    "restart": "RESTART_FAILED",
    "delete": "DELETE_FAILED",
    "recreate": "LOST",
}


def unclear(error: HypervisorError) -> bool:
    """Whether after this error the agent may have done the work, or still be at it."""
    return isinstance(error, DeadlineExceeded | Cancelled) or (
        isinstance(error, Unavailable) and not nothing_begun(error)
    )


def nothing_begun(error: HypervisorError) -> bool:
    """Whether after this error the agent has certainly done nothing, so that nothing of the work can be left."""
    return error.reason in _NOTHING_BEGUN and "left" not in error.metadata


def succeed(
    draft: Draft,
    operation_id: str,
    reply: Observation,
    *,
    server_id: str,
    error: HypervisorError | None = None,
) -> OperationRecord:
    """The agent answered: take its observation in and end the operation.

    With ``error`` it ends as that says: a cancelled start, which the agent has undone.
    """
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance = _held(draft, operation)
    if instance is not None:
        if error is not None:
            instance = structs.replace(instance, desired=_desired_after(operation, instance, error))
        elif operation.verb == "restore-snapshot":
            # What was wanted when the snapshot was taken is wanted again.
            instance = structs.replace(instance, desired=_WANTED.get(reply.status, instance.desired))
        elif operation.verb == "update":
            instance = end_update(draft, instance, operation, done=True)
        draft.put(keys.instance(instance.id), settle(instance, reply, now=draft.now))
    return _end(draft, operation, error)


def remove(
    draft: Draft, operation_id: str, *, server_id: str, error: HypervisorError | None = None
) -> OperationRecord:
    """Nothing of the instance is left on its node: remove its records, free its capacity, end the operation."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance = _held(draft, operation)
    if instance is not None:
        release(draft, instance)
    return _end(draft, operation, error)


def cleanup_later(
    draft: Draft, operation_id: str, *, server_id: str, error: HypervisorError
) -> OperationRecord:
    """Something may be left on a node that does not answer: keep the reservation and leave the rest to the reconciler.

    The operation ends now; the instance stays, DELETING, until its node has confirmed that nothing is left.
    """
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance = _held(draft, operation)
    if instance is not None:
        draft.put(
            keys.instance(instance.id),
            structs.replace(
                instance,
                status=InstanceStatus.DELETING,
                status_reason=f"{operation.verb.upper()}_FAILED",
                status_message="removed as soon as its node answers: " + error.message,
                desired=DesiredState.DELETED,
                operation_id="",
                transition_deadline=None,
                updated_at=draft.now,
            ),
        )
    return _end(draft, operation, error)


def fail(
    draft: Draft, operation_id: str, *, server_id: str, error: HypervisorError, tried: bool = False
) -> OperationRecord:
    """An operation on an instance that is there failed: it stays, as far as that is known, as it is.

    ``tried``: an agent was asked for it before, and may have done it, whatever it answered in the end.
    """
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance = _held(draft, operation)
    if instance is not None:
        if operation.verb == "update" and not unclear(error):
            instance = end_update(draft, instance, operation, done=False)
        status, reason = _after_failure(operation.verb, instance, error)
        if tried and nothing_begun(error):
            status, reason = InstanceStatus.UNKNOWN, error.reason
        if not can_move(instance.status, status):
            status, reason = InstanceStatus.UNKNOWN, error.reason
        draft.put(
            keys.instance(instance.id),
            structs.replace(
                instance,
                status=status,
                status_reason=reason,
                status_message=f"{operation.verb} failed: {error.message}",
                desired=_desired_after(operation, instance, error),
                operation_id="",
                transition_deadline=None,
                updated_at=draft.now,
            ),
        )
    return _end(draft, operation, error)


def progress(
    draft: Draft, operation_id: str, *, server_id: str, message: str, percent: int
) -> OperationRecord:
    """Say how far a slow operation is; an instance that is being made or started shows as CREATING."""
    operation = driven_operation(draft, operation_id, server_id=server_id)
    instance = _held(draft, operation)
    making = operation.verb in ("create", "replace", "start")
    if instance is not None and making and can_move(instance.status, InstanceStatus.CREATING):
        draft.put(
            keys.instance(instance.id),
            structs.replace(instance, status=InstanceStatus.CREATING, updated_at=draft.now),
        )
    changed = structs.replace(operation, progress_percent=percent, progress_message=message)
    draft.put(keys.operation(operation_id), changed)
    return changed


def take_over(draft: Draft, operation_id: str, *, server_id: str, time_s: float) -> OperationRecord | None:
    """Make this server the one that drives an operation: its server is dead, or it is long past its deadline.

    None where neither is so (any more).
    """
    found = draft.get(keys.operation(operation_id))
    if found is None or found.value.done:
        return None
    operation = found.value
    instance = _held(draft, operation)
    if operation.server_id != server_id:
        alive = draft.get(keys.server_lease(operation.server_id)) is not None
        overdue = (
            instance is not None
            and instance.transition_deadline is not None
            and instance.transition_deadline < draft.now
        )
        if alive and not overdue:
            return None
    if instance is not None:
        deadline = draft.now + timedelta(seconds=time_s)
        draft.put(keys.instance(instance.id), structs.replace(instance, transition_deadline=deadline))
    taken = structs.replace(operation, server_id=server_id)
    draft.put(keys.operation(operation_id), taken)
    return taken


def driven_operation(draft: Draft, operation_id: str, *, server_id: str) -> OperationRecord:
    """The operation, if it goes on and is this server's to end. Raises Conflict (``OPERATION_TAKEN_OVER``)."""
    found = draft.get(keys.operation(operation_id))
    if found is None or found.value.done or found.value.server_id != server_id:
        raise Conflict(
            f"operation {operation_id} is not this server's to end (any more)",
            reason=TAKEN_OVER,
            metadata={"operation_id": operation_id},
        )
    return found.value


def _held(draft: Draft, operation: OperationRecord) -> Instance | None:
    """The operation's instance, if it still holds it."""
    found = draft.get(keys.instance(operation.object_id))
    return found.value if found is not None and found.value.operation_id == operation.id else None


def _end(draft: Draft, operation: OperationRecord, error: HypervisorError | None) -> OperationRecord:
    ended = end_operation(operation, error, now=draft.now)
    draft.put(keys.operation(operation.id), ended)
    return ended


def end_operation(
    operation: OperationRecord, error: HypervisorError | None, *, now: datetime
) -> OperationRecord:
    """The operation, ended: well, or as the error says."""
    if error is None:
        state = OperationState.SUCCEEDED
    else:
        state = OperationState.CANCELLED if isinstance(error, Cancelled) else OperationState.FAILED
    return structs.replace(
        operation,
        state=state,
        error=None if error is None else record_of(error),
        progress_percent=100 if error is None else operation.progress_percent,
        progress_message="",
        finished_at=now,
    )


def _desired_after(operation: OperationRecord, instance: Instance, error: HypervisorError) -> DesiredState:
    """What is wanted of the instance after an operation that came to nothing: what was before.

    An end of the instance is judged by it: one that nobody wants any more is no failure, and the other way round.
    """
    match operation.verb:
        case "start" if isinstance(error, Cancelled):
            return DesiredState.STOPPED
        case "stop" | "suspend" if instance.status is InstanceStatus.STOPPING and not unclear(error):
            return DesiredState.RUNNING
        case "pause" if not unclear(error):
            return DesiredState.RUNNING
        case "resume" if not unclear(error):
            return DesiredState.PAUSED
        case "delete" if not unclear(error):
            return DesiredState.STOPPED
    return instance.desired


def _after_failure(verb: str, instance: Instance, error: HypervisorError) -> tuple[InstanceStatus, str]:
    """Status and reason after a failed operation. UNKNOWN where only its node can tell: the reconciler asks it."""
    status = instance.status
    if unclear(error):
        return InstanceStatus.UNKNOWN, error.reason
    if verb == "delete":
        # As much of it as there was may be left, and may run.
        return InstanceStatus.UNKNOWN, error.reason if nothing_begun(error) else _FAILED_REASONS[verb]
    if status not in (InstanceStatus.STOPPING, InstanceStatus.CREATING, InstanceStatus.DELETING):
        settled = status if nothing_begun(error) or verb not in _FAILED_REASONS else InstanceStatus.FAILED
        return settled, instance.status_reason if settled is status else _FAILED_REASONS[verb]
    if nothing_begun(error):
        # What it was before is not on record: let the node tell.
        return InstanceStatus.UNKNOWN, error.reason
    if verb in _ENDS:
        return InstanceStatus.RUNNING, ""
    return InstanceStatus.FAILED, _FAILED_REASONS[verb]
