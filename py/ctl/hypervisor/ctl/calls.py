"""Mutating calls: one request id for each, so that a lost reply is settled by asking and a repeat has no second effect.

The server keeps every mutating call as an operation that is found by the request id. When the connection breaks after
a call was sent, :func:`perform` asks for that operation: it is there (then its end is waited for) or it is not (then
the call never arrived and is sent again).
"""

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc

from hypervisor.core.errors import DeadlineExceeded, HypervisorError, NotFound, Unavailable
from hypervisor.ctl.session import Deadline, Session, translated, was_never_sent

if TYPE_CHECKING:
    from hypervisor.v1.operation_pb2 import Operation

__all__ = ["MUTATION_TIMEOUT_S", "Interrupted", "Mutating", "ensure_ended_well", "follow", "perform"]

MUTATION_TIMEOUT_S = 600.0
_PROGRESS_INTERVAL_S = 0.4
_REFUSED_ATTEMPTS = 4
_SETTLE_S = 30.0

Progress = Callable[["Operation"], None]


class Mutating(Protocol):
    """A request of a mutating call."""

    request_id: str


R = TypeVar("R", bound=Mutating)


class Interrupted(KeyboardInterrupt):
    """The keyboard ended the wait for an operation, which goes on. ``operation_id`` is empty where it is unknown."""

    def __init__(self, operation_id: str) -> None:
        super().__init__(operation_id)
        self.operation_id = operation_id


def perform(
    session: Session,
    method: "grpc.UnaryUnaryMultiCallable[R, Operation]",
    request: R,
    *,
    deadline: Deadline,
    progress: Progress | None = None,
) -> "Operation":
    """Send the request and return its operation: ended well, or only recorded where the request says ``no_wait``.

    ``progress`` is called about twice a second with the operation as it is. Raises the operation's own error where
    it failed; DeadlineExceeded with the metadata ``operation_id`` where it still goes on; Unavailable where nobody
    can say what became of the call.
    """
    request.request_id = request.request_id or str(uuid.uuid4())
    waiting = not getattr(request, "no_wait", False)
    attempt = passed_over = 0
    while True:
        attempt += 1
        server = session.server
        call = method.future(request, timeout=deadline.left_s(), metadata=session.metadata)
        try:
            return ensure_ended_well(_result(session, call, request.request_id, progress))
        except KeyboardInterrupt:
            call.cancel()
            raise Interrupted(_operation_id(session, request.request_id)) from None
        except DeadlineExceeded as exc:
            raise _with_operation(session, exc, request.request_id) from exc
        except Unavailable as exc:
            if "operation_id" in exc.metadata:
                raise
            if attempt == 1 and was_never_sent(exc):
                passed_over += 1
                if passed_over >= session.servers:
                    raise
                session.advance(server)
                attempt = 0
                continue
            if exc.reason != "PEER_UNREACHABLE":  # the server refused it for now: nothing was recorded
                if attempt >= _REFUSED_ATTEMPTS or not session.pause(attempt, exc, deadline):
                    raise
                continue
            settled = _settle(session, request.request_id, exc, deadline)
        if settled is not None:
            if settled.done or not waiting:
                return ensure_ended_well(settled)
            return follow(session, settled.id, deadline=deadline, progress=progress)


def follow(
    session: Session, operation: str, *, deadline: Deadline, progress: Progress | None = None
) -> "Operation":
    """Wait until the operation (id or request id) has ended well. Raises as :func:`perform` does."""
    from hypervisor.v1.operation_pb2 import WaitOperationRequest

    attempt = 0
    while True:
        left = deadline.left_s()
        slice_s = 20.0 if progress is None else _PROGRESS_INTERVAL_S
        slice_s = slice_s if left is None else min(slice_s, left)
        request = WaitOperationRequest(operation=operation)
        request.timeout.FromNanoseconds(int(slice_s * 1e9))
        try:
            with translated(session.server):
                found = session.operations.WaitOperation(
                    request, timeout=slice_s + 5.0, metadata=session.metadata
                )
            attempt = 0
        except KeyboardInterrupt:
            raise Interrupted(operation) from None
        except Unavailable as exc:
            attempt += 1
            if not session.pause(min(attempt, 4), exc, deadline):
                raise
            continue
        if found.done:
            return ensure_ended_well(found)
        if progress is not None:
            progress(found)
        if not deadline.allows(0):
            raise DeadlineExceeded(
                f"operation {found.id} ({found.verb} {found.object_name}) has not ended in the time allowed",
                metadata={"operation_id": found.id},
            )


def ensure_ended_well(operation: "Operation") -> "Operation":
    """The operation itself, or its error raised, with the metadata ``operation_id``."""
    if not operation.done or not operation.error.code:
        return operation
    from hypervisor.core.grpc_errors import error_of_status

    error = error_of_status(operation.error)
    raise _noting(error, operation.id)


def _result(
    session: Session,
    call: "grpc.Future[Operation]",
    request_id: str,
    progress: Progress | None,
) -> "Operation":
    with translated(session.server):
        while progress is not None:
            try:
                return call.result(timeout=_PROGRESS_INTERVAL_S)
            except grpc.FutureTimeoutError:
                found = _look(session, request_id)
                if found is not None:
                    progress(found)
        return call.result()


def _look(session: Session, request_id: str) -> "Operation | None":
    """The operation of a request as it is now; None when it cannot be had at once."""
    from hypervisor.v1.operation_pb2 import GetOperationRequest

    try:
        with translated(session.server):
            return session.operations.GetOperation(
                GetOperationRequest(operation=request_id), timeout=2.0, metadata=session.metadata
            )
    except HypervisorError:
        return None  # asked for display or for a hint only; the call itself reports what is wrong


def _operation_id(session: Session, request_id: str) -> str:
    found = _look(session, request_id)
    return found.id if found is not None else ""


def _settle(session: Session, request_id: str, lost: Unavailable, deadline: Deadline) -> "Operation | None":
    """What became of a call whose reply was lost; None: it never arrived. Raises when no server can say."""
    from hypervisor.v1.operation_pb2 import GetOperationRequest

    left = deadline.left_s()
    patience = Deadline(_SETTLE_S if left is None else min(left, _SETTLE_S))
    attempt = 0
    while True:
        attempt += 1
        try:
            with translated(session.server):
                return session.operations.GetOperation(
                    GetOperationRequest(operation=request_id), timeout=5.0, metadata=session.metadata
                )
        except NotFound:
            return None
        except (Unavailable, DeadlineExceeded) as exc:
            # The pause goes on to another server, where there is one: what was recorded, each of them knows.
            if not session.pause(min(attempt, 4), exc, patience):
                raise Unavailable(
                    f"the connection to the server {session.server} was lost before it answered, so the outcome is "
                    f"unknown: ask later with 'hypervisor-ctl operation get {request_id}' ({lost.message})",
                    reason="OUTCOME_UNKNOWN",
                    metadata={"request_id": request_id},
                ) from exc


def _noting(error: HypervisorError, operation_id: str) -> HypervisorError:
    if not operation_id or "operation_id" in error.metadata:
        return error
    return type(error)(
        error.message,
        reason=error.reason,
        metadata={**error.metadata, "operation_id": operation_id},
        violations=error.violations,
        retry_after_s=error.retry_after_s,
    )


def _with_operation(session: Session, error: DeadlineExceeded, request_id: str) -> HypervisorError:
    return _noting(error, "" if "operation_id" in error.metadata else _operation_id(session, request_id))
