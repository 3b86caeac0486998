"""``operation``: list, get, wait, cancel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hypervisor.ctl.calls import MUTATION_TIMEOUT_S, follow
from hypervisor.ctl.display.columns import operation_columns
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, listed, watchable
from hypervisor.ctl.output import ProgressLine, now_s, show_list, show_one
from hypervisor.ctl.paging import Listing, joined, list_all
from hypervisor.ctl.session import READ_TIMEOUT_S, Deadline, Session
from hypervisor.v1.operation_pb2 import (
    CancelOperationRequest,
    GetOperationRequest,
    ListOperationsRequest,
    Operation,
)

if TYPE_CHECKING:
    from hypervisor.ctl.watching import Fetch

__all__ = ["operation"]

_operation = click.argument("operation", type=NAME("operation"))


@click.group()
def operation() -> None:
    """What was asked of the cluster, and what became of it. OPERATION is an id, or the request id of the call."""


def _list(
    session: Session, deadline: Deadline, *, conditions: Sequence[str], sort: str, limit: int | None
) -> Listing[Operation]:
    request = ListOperationsRequest(filter=joined(conditions), order_by=sort)
    return list_all(
        session,
        session.operations.ListOperations,
        request,
        lambda page: page.operations,
        limit=limit,
        deadline=deadline,
    )


@operation.command("list")
@listed
@watchable
@formatted
@connected
@pass_invocation
def list_operations(
    invocation: Invocation, *, filters: Sequence[str], sort: str | None, limit: int | None, watch: bool
) -> None:
    """Show operations, newest first, as long as the server keeps them (a day, unless configured).

    Fields for --filter: id, verb, object_kind, object_id, object_name, project, principal, state, done. For --sort:
    started_at, finished_at, verb, object_name.
    """
    if watch:
        _watch(invocation, filters, sort or "", limit)
        return
    deadline = invocation.deadline(READ_TIMEOUT_S)
    found = _list(invocation.session(), deadline, conditions=filters, sort=sort or "", limit=limit)
    show_list(
        invocation,
        found,
        lambda: operation_columns(now_s()),
        name=lambda item: item.id,
        empty="No operations match." if filters else "No operations.",
    )


def _watch(invocation: Invocation, filters: Sequence[str], sort: str, limit: int | None) -> None:
    from hypervisor.ctl.eventstream import Follow
    from hypervisor.ctl.watching import WatchedList, run_watch

    def fetched(*more: str) -> "Fetch[Operation]":
        return lambda session, deadline: _list(
            session, deadline, conditions=[*filters, *more], sort=sort, limit=limit
        )

    run_watch(
        invocation,
        WatchedList(
            follow=Follow(kinds=("operation",)),
            fetch=fetched(),
            taken_from=lambda event: event.operation,
            key=lambda item: item.id,
            name=lambda item: item.id,
            columns=lambda items: operation_columns(now_s()),
            # Newest first is an order too: the server keeps it.
            narrowed=lambda object_id: fetched(f"id={object_id}"),
        ),
    )


def _show(invocation: Invocation, found: Operation) -> None:
    def text() -> str:
        from hypervisor.ctl.display.details import operation_details

        return operation_details(found, now_s=now_s())

    show_one(invocation, found, text, name=lambda item: item.id)


@operation.command("get")
@_operation
@formatted
@connected
@pass_invocation
def get_operation(invocation: Invocation, *, operation: str) -> None:
    """Show one operation, and the cause where it failed."""
    session = invocation.session()
    request = GetOperationRequest(operation=operation)
    deadline = invocation.deadline(READ_TIMEOUT_S)
    _show(invocation, session.read(session.operations.GetOperation, request, deadline=deadline))


@operation.command("wait")
@_operation
@formatted
@connected
@pass_invocation
def wait(invocation: Invocation, *, operation: str) -> None:
    """Wait until an operation has ended. One that failed ends with its error and exit code."""
    deadline = invocation.deadline(MUTATION_TIMEOUT_S)
    line = ProgressLine.for_terminal()
    try:
        found = follow(invocation.session(), operation, deadline=deadline, progress=line)
    finally:
        if line is not None:
            line.clear()
    _show(invocation, found)


@operation.command("cancel")
@_operation
@formatted
@connected
@pass_invocation
def cancel(invocation: Invocation, *, operation: str) -> None:
    """Ask for the end of an operation; what it has done is undone where that is possible."""
    session = invocation.session()
    request = CancelOperationRequest(operation=operation)
    # Cancelling twice is harmless, so this is repeated like a read.
    deadline = invocation.deadline(READ_TIMEOUT_S)
    _show(invocation, session.read(session.operations.CancelOperation, request, deadline=deadline))
