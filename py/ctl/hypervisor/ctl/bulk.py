"""Mutating calls on several objects at once: what runs, how it shows, and one exit code for all."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from hypervisor.core.errors import HypervisorError
from hypervisor.ctl import failures
from hypervisor.ctl.calls import MUTATION_TIMEOUT_S, perform
from hypervisor.ctl.display.table import harmless
from hypervisor.ctl.invocation import Invocation
from hypervisor.ctl.output import ProgressLine, note, write

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from hypervisor.v1.operation_pb2 import Operation

__all__ = ["Task", "run_tasks", "told"]

_AT_ONCE = 16


class Task(NamedTuple):
    """One call: the name it goes by, the method and the request."""

    name: str
    method: "grpc.UnaryUnaryMultiCallable[Any, Operation]"
    request: Any


def run_tasks(
    invocation: Invocation,
    tasks: Sequence[Task],
    *,
    done: str,
    tell: "Callable[[Operation, str], str] | None" = None,
) -> None:
    """Run them, at most 16 at once, and show each as it ends in the order given.

    One task that fails raises its error. Of several, each failure is reported as it comes, the others go on, and the
    program ends with the exit code of the first failure.
    """
    tell = tell or told
    first: HypervisorError | None = None
    finished: list[Operation] = []
    for task, outcome in _outcomes(invocation, tasks):
        if isinstance(outcome, HypervisorError):
            if len(tasks) == 1:
                raise outcome
            first = first or outcome
            text = failures.as_json(outcome) if invocation.output == "json" else failures.as_text(outcome)
            note(f"{harmless(task.name)}: {text}" if invocation.output != "json" else text)
            continue
        finished.append(outcome)
        if invocation.output not in ("json", "yaml"):
            write(_line(invocation, outcome, done, tell))
    _show_documents(invocation, tasks, finished)
    if first is not None:
        raise click.exceptions.Exit(failures.exit_code(first))


def told(operation: "Operation", done: str) -> str:
    """One line: what was done, or what goes on."""
    name = harmless(operation.object_name or operation.object_id)
    if not operation.done:
        return f"{operation.object_kind} {name}: {operation.verb} goes on as operation {operation.id}"
    return f"{operation.object_kind} {name} {done}"


def _line(
    invocation: Invocation, operation: "Operation", done: str, tell: "Callable[[Operation, str], str]"
) -> str:
    if invocation.quiet:
        return operation.object_name if operation.done else operation.id
    return tell(operation, done)


def _show_documents(invocation: Invocation, tasks: Sequence[Task], finished: "Sequence[Message]") -> None:
    if invocation.output not in ("json", "yaml"):
        return
    from hypervisor.ctl.display import documents

    if len(tasks) == 1 and not finished:
        return
    answer = finished[0] if len(tasks) == 1 else finished
    write(documents.as_json(answer) if invocation.output == "json" else documents.as_yaml(answer))


def _outcomes(
    invocation: Invocation, tasks: Sequence[Task]
) -> "Iterator[tuple[Task, Operation | HypervisorError]]":
    session = invocation.session()
    line = ProgressLine.for_terminal()

    def run(task: Task, *, shown: ProgressLine | None) -> "Operation | HypervisorError":
        deadline = invocation.deadline(MUTATION_TIMEOUT_S)
        try:
            return perform(session, task.method, task.request, deadline=deadline, progress=shown)
        except HypervisorError as exc:
            return exc

    try:
        if len(tasks) == 1:
            outcome = run(tasks[0], shown=line)
            if line is not None:
                line.clear()
            yield tasks[0], outcome
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(tasks))) as pool:
            futures = [pool.submit(run, task, shown=None) for task in tasks]
            try:
                for number, (task, future) in enumerate(zip(tasks, futures, strict=True)):
                    if line is not None and not future.done():
                        line.say(f"{number} of {len(tasks)} done, waiting for {task.name}")
                    outcome = future.result()
                    if line is not None:
                        line.clear()
                    yield task, outcome
            except BaseException:
                # Keyboard or a closed pipe: what is not begun never is; what waits ends with its channel.
                pool.shutdown(wait=False, cancel_futures=True)
                invocation.close()
                raise
    finally:
        if line is not None:
            line.clear()
