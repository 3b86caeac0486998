"""``node drain`` and ``node uncordon --restore``: emptying a node, and bringing home what was taken from it."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from hypervisor.core.errors import InvalidArgument, Unavailable
from hypervisor.ctl.calls import Interrupted
from hypervisor.ctl.commands.instance_move import STRATEGIES
from hypervisor.ctl.display.columns import drain_columns
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, NAME, connected, formatted
from hypervisor.ctl.output import ProgressLine, note, show_list, write
from hypervisor.ctl.paging import list_all
from hypervisor.ctl.session import READ_TIMEOUT_S, Deadline, Session, translated
from hypervisor.v1.cluster_pb2 import DrainNodeProgress, DrainNodeRequest, ListNodesRequest
from hypervisor.v1.instance_pb2 import MoveStrategy
from hypervisor.v1.maintenance_pb2 import CancelDrainRequest, RestoreNodeRequest, WatchDrainRequest

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

    from hypervisor.v1.cluster_pb2 import DrainInstance

__all__ = ["drain", "restore_nodes"]

_TYPES = ("vm", "container", "microvm")
_PATIENCE_S = 60.0
"""How long a drain whose server went away is looked for on the servers that are left."""
_TOLD_STATES = ("moved", "gone", "stuck", "stopped")


@click.command("drain")
@click.argument("node", type=NAME("node"))
@click.option("--dry-run", is_flag=True, help="Show what would be done with each instance, and do nothing.")
@click.option("--cancel", is_flag=True, help="Begin nothing more of the drain that goes on.")
@click.option("--watch", is_flag=True, help="Only watch the drain that goes on.")
@click.option(
    "--wait/--no-wait", "wait", default=True, help="Watch it to its end (the default), or only begin it."
)
@click.option(
    "--give-up-after", "limit_s", type=DURATION, metavar="DURATION", help="End it after this. Default: 10m."
)
@click.option(
    "--deadline",
    "deadline_s",
    type=DURATION,
    metavar="DURATION",
    help="With --force: from when on what still runs there is stopped by force. Default: as --give-up-after.",
)
@click.option(
    "--force", is_flag=True, help="Stop by force what could not be moved in time, whatever budgets say."
)
@click.option("--parallel", type=click.IntRange(1, 64), metavar="N", help="Moved at once. Default: 2.")
@click.option(
    "--strategy",
    "strategies",
    metavar="[TYPE=]STRATEGY",
    multiple=True,
    help="auto, live, replace or stop, for one type (vm, container, microvm) or for all; repeatable.",
)
@click.option("--allow-disk-loss", is_flag=True, help="Let go what machines wrote to their disks.")
@click.option(
    "--healthy-after",
    "healthy_s",
    type=DURATION,
    metavar="DURATION",
    help="How long a copy has to have run before it takes over.",
)
@click.option(
    "--grace-period", "grace_s", type=DURATION, metavar="DURATION", help="For copies that have to go."
)
@click.option("--reason", metavar="TEXT", default="", help="Shown to others as the node's message.")
@formatted
@connected
@pass_invocation
def drain(
    invocation: Invocation,
    *,
    node: str,
    dry_run: bool,
    cancel: bool,
    watch: bool,
    wait: bool,
    limit_s: float | None,
    deadline_s: float | None,
    force: bool,
    parallel: int | None,
    strategies: Sequence[str],
    allow_disk_loss: bool,
    healthy_s: float | None,
    grace_s: float | None,
    reason: str,
) -> None:
    """Cordon a node and move everything off it, within the disruption budgets.

    The drain goes on without this program: --watch shows it again, --cancel ends it. Instances remember the node:
    'node uncordon --restore' brings them home.
    """
    session = invocation.session()
    if sum((dry_run, cancel, watch)) > 1:
        raise click.UsageError("give one of --dry-run, --cancel and --watch")
    if cancel:
        with translated(session.server):
            session.maintenance.CancelDrain(
                CancelDrainRequest(node=node), timeout=READ_TIMEOUT_S, metadata=session.metadata
            )
        write(node if invocation.quiet else f"node {node}: no more is moved; it stays cordoned")
        return
    if watch:
        _follow(
            invocation, node, lambda: session.maintenance.WatchDrain, WatchDrainRequest(node=node), "drained"
        )
        return
    request = DrainNodeRequest(
        node=node,
        request_id=str(uuid.uuid4()),
        dry_run=dry_run,
        force=force,
        parallel=parallel or 0,
        allow_disk_loss=allow_disk_loss,
        strategies=_strategies(strategies),
        reason=reason,
    )
    _spans(request, timeout=limit_s, deadline=deadline_s, healthy_after=healthy_s, grace_period=grace_s)
    if dry_run:
        _show_plan(invocation, session.cluster.DrainNode, request)
        return
    _follow(invocation, node, lambda: session.cluster.DrainNode, request, "drained", wait=wait)


def restore_nodes(invocation: Invocation, nodes: Iterable[str], *, limit_s: float | None) -> None:
    """Uncordon nodes and bring their instances home, one node after another."""
    session = invocation.session()
    for name in nodes:
        request = RestoreNodeRequest(node=name, request_id=str(uuid.uuid4()))
        _spans(request, timeout=limit_s)
        done = "uncordoned, and its instances are home"
        _follow(invocation, name, lambda: session.maintenance.RestoreNode, request, done)


def _strategies(given: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        kind, equals, name = text.rpartition("=")
        if name not in STRATEGIES or (equals and kind not in _TYPES):
            raise InvalidArgument.of_field(
                "--strategy",
                f"{text[:40]!r} is none: use {', '.join(STRATEGIES)}, for one type as in vm=stop",
            )
        number = MoveStrategy.Value(f"MOVE_STRATEGY_{name.upper()}")
        found |= dict.fromkeys((kind,) if equals else _TYPES, number)
    return found


def _spans(request: Any, **spans: float | None) -> None:
    for name, seconds in spans.items():
        if seconds is not None:
            span: Duration = getattr(request, name)
            span.FromNanoseconds(int(seconds * 1e9))


def _show_plan(invocation: Invocation, method: Any, request: DrainNodeRequest) -> None:
    session = invocation.session()
    with translated(session.server):
        (plan,) = method(
            request, timeout=invocation.deadline(READ_TIMEOUT_S).left_s(), metadata=session.metadata
        )
    hostnames = _hostnames(session, invocation.deadline(READ_TIMEOUT_S))
    if invocation.output in ("json", "yaml"):
        _write_document(invocation, plan)
        return
    show_list(
        invocation,
        list(plan.instances),
        lambda: drain_columns(hostnames),
        name=lambda one: one.name,
        empty="Nothing is on it.",
    )
    if not invocation.quiet:
        note(plan.message)


def _hostnames(session: Session, deadline: Deadline) -> dict[str, str]:
    nodes = list_all(
        session,
        session.cluster.ListNodes,
        ListNodesRequest(),
        lambda page: page.nodes,
        limit=None,
        deadline=deadline,
    )
    return {node.id: node.hostname for node in nodes}


def _write_document(invocation: Invocation, step: DrainNodeProgress) -> None:
    from hypervisor.ctl.display import documents

    write(documents.as_json(step) if invocation.output == "json" else documents.as_yaml(step))


def _follow(
    invocation: Invocation,
    node: str,
    method: "Callable[[], Any]",
    request: Any,
    done: str,
    *,
    wait: bool = True,
) -> None:
    """Show the steps to the end. A server that goes away is looked for again: a repeat goes on with the same drain."""
    session = invocation.session()
    line = ProgressLine.for_terminal()
    last: DrainNodeProgress | None = None
    told: set[tuple[str, int]] = set()
    patience, attempt = Deadline(_PATIENCE_S), 0
    try:
        while True:
            try:
                with translated(session.server):
                    for step in method()(request, timeout=invocation.timeout_s, metadata=session.metadata):
                        patience, attempt, last = Deadline(_PATIENCE_S), 0, step
                        _tell(step, told, line)
                        if not wait:
                            break
                break
            except Unavailable as exc:
                attempt += 1
                if last is None and attempt > 1:
                    raise
                if not session.pause(min(attempt, 4), exc, patience):
                    raise
    except KeyboardInterrupt:
        raise Interrupted("" if last is None else last.operation_id) from None
    finally:
        if line is not None:
            line.clear()
    if last is None:
        return
    if invocation.output in ("json", "yaml"):
        _write_document(invocation, last)
    elif invocation.quiet:
        write(node)
    elif last.done:
        write(f"node {node} {done}: {last.instances_moved} of {last.instances_total} moved; {last.message}")
    else:
        write(f"node {node}: goes on as operation {last.operation_id}")


def _tell(step: DrainNodeProgress, told: set[tuple[str, int]], line: ProgressLine | None) -> None:
    """Say what became of instances since the step before, and how far it all is."""
    for one in step.instances:
        state = _state(one)
        if state in _TOLD_STATES and (one.instance_id, one.state) not in told:
            told.add((one.instance_id, one.state))
            if line is not None:
                line.clear()
            note(f"instance {one.name} {state}{f': {one.message}' if one.message else ''}")
    text = f"{step.instances_moved} of {step.instances_total} moved: {step.message}"
    if line is not None:
        line.say(text)
    elif not step.instances or step.done:
        note(text)


def _state(one: "DrainInstance") -> str:
    from hypervisor.v1.cluster_pb2 import DrainInstance

    return DrainInstance.State.Name(one.state).removeprefix("STATE_").lower()
