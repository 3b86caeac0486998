"""``node``: list, get, cordon, uncordon, taint, untaint, drain, evacuate, fencing, deregister."""

from collections.abc import Sequence

import click

from hypervisor.ctl.bulk import Task, run_tasks
from hypervisor.ctl.commands.node_drain import drain, restore_nodes
from hypervisor.ctl.display.columns import node_columns
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, NAME, connected, formatted, listed, watchable
from hypervisor.ctl.output import now_s, show_list, show_one
from hypervisor.ctl.paging import Listing, joined, list_all
from hypervisor.ctl.session import READ_TIMEOUT_S, Deadline, Session
from hypervisor.v1.cluster_pb2 import (
    CordonNodeRequest,
    DeregisterNodeRequest,
    GetNodeRequest,
    ListNodesRequest,
    SetNodeFencingRequest,
    TaintNodeRequest,
    UncordonNodeRequest,
    UntaintNodeRequest,
)
from hypervisor.v1.node_pb2 import Node

__all__ = ["node"]

_node = click.argument("node", type=NAME("node"))
_nodes = click.argument("nodes", metavar="NODE...", nargs=-1, required=True, type=NAME("node"))
_version = click.option(
    "--if-version",
    "resource_version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only if the node still has this resource_version.",
)


@click.group()
def node() -> None:
    """The machines that run instances. NODE is an id or a host name."""


def _list(
    session: Session, deadline: Deadline, *, conditions: Sequence[str], sort: str, limit: int | None
) -> Listing[Node]:
    request = ListNodesRequest(filter=joined(conditions), order_by=sort)
    return list_all(
        session, session.cluster.ListNodes, request, lambda page: page.nodes, limit=limit, deadline=deadline
    )


@node.command("list")
@listed
@watchable
@formatted
@connected
@pass_invocation
def list_nodes(
    invocation: Invocation, *, filters: Sequence[str], sort: str | None, limit: int | None, watch: bool
) -> None:
    """Show nodes.

    Fields for --filter: id, hostname (a trailing * matches any end), status, role, region, zone, schedulable and
    labels.KEY. For --sort: hostname, created_at, status, region, zone.
    """
    if watch:
        _watch(invocation, filters, sort or "", limit)
        return
    deadline = invocation.deadline(READ_TIMEOUT_S)
    found = _list(invocation.session(), deadline, conditions=filters, sort=sort or "", limit=limit)
    show_list(
        invocation,
        found,
        lambda: node_columns(now_s()),
        name=lambda item: item.hostname,
        empty="No nodes match." if filters else "No nodes: start an agent, or 'hypervisor-ctl dev up'.",
    )


def _watch(invocation: Invocation, filters: Sequence[str], sort: str, limit: int | None) -> None:
    from hypervisor.ctl.eventstream import Follow
    from hypervisor.ctl.watching import Fetch, WatchedList, run_watch

    def fetched(*more: str) -> Fetch[Node]:
        return lambda session, deadline: _list(
            session, deadline, conditions=[*filters, *more], sort=sort, limit=limit
        )

    plain = not filters and not sort and limit is None
    run_watch(
        invocation,
        WatchedList(
            follow=Follow(kinds=("node",)),
            fetch=fetched(),
            taken_from=lambda event: event.node,
            key=lambda item: item.id,
            name=lambda item: item.hostname,
            columns=lambda items: node_columns(now_s()),
            narrowed=None if plain else lambda object_id: fetched(f"id={object_id}"),
        ),
    )


@node.command("get")
@_node
@formatted
@connected
@pass_invocation
def get_node(invocation: Invocation, *, node: str) -> None:
    """Show one node, its drivers and what each of them cannot do."""
    session = invocation.session()
    deadline = invocation.deadline(READ_TIMEOUT_S)
    found = session.read(session.cluster.GetNode, GetNodeRequest(node=node), deadline=deadline)

    def text() -> str:
        from hypervisor.ctl.display.details import node_details

        return node_details(found, now_s=now_s())

    show_one(invocation, found, text, name=lambda item: item.hostname)


@node.command("cordon")
@_nodes
@click.option("--reason", metavar="TEXT", default="", help="Shown to others as the node's message.")
@_version
@formatted
@connected
@pass_invocation
def cordon(
    invocation: Invocation, *, nodes: Sequence[str], reason: str, resource_version: int | None
) -> None:
    """Put nothing new on nodes; what runs there goes on."""
    session = invocation.session()
    tasks = [
        Task(
            name,
            session.cluster.CordonNode,
            CordonNodeRequest(node=name, reason=reason, resource_version=resource_version or 0),
        )
        for name in nodes
    ]
    run_tasks(invocation, tasks, done="cordoned")


@node.command("uncordon")
@_nodes
@click.option("--restore", is_flag=True, help="Bring the instances home as well that drains took from them.")
@click.option(
    "--give-up-after",
    "limit_s",
    type=DURATION,
    metavar="DURATION",
    help="With --restore: end it after this. Default: 10m.",
)
@_version
@formatted
@connected
@pass_invocation
def uncordon(
    invocation: Invocation,
    *,
    nodes: Sequence[str],
    restore: bool,
    limit_s: float | None,
    resource_version: int | None,
) -> None:
    """Let new instances be placed on nodes again."""
    if restore:
        if resource_version is not None:
            raise click.UsageError("--if-version does not go with --restore")
        restore_nodes(invocation, nodes, limit_s=limit_s)
        return
    session = invocation.session()
    tasks = [
        Task(
            name,
            session.cluster.UncordonNode,
            UncordonNodeRequest(node=name, resource_version=resource_version or 0),
        )
        for name in nodes
    ]
    run_tasks(invocation, tasks, done="uncordoned")


@node.command("taint")
@_node
@click.argument("taint")
@_version
@formatted
@connected
@pass_invocation
def set_taint(invocation: Invocation, *, node: str, taint: str, resource_version: int | None) -> None:
    """Keep instances that do not tolerate it off a node; what runs there goes on.

    TAINT is KEY:EFFECT or KEY=VALUE:EFFECT; EFFECT is no_schedule, or prefer_no_schedule to only rank the node down.
    """
    from hypervisor.ctl.terms import taint_of

    request = TaintNodeRequest(
        node=node, taint=taint_of("TAINT", taint), resource_version=resource_version or 0
    )
    session = invocation.session()
    run_tasks(invocation, [Task(node, session.cluster.TaintNode, request)], done="tainted")


@node.command("untaint")
@_node
@click.argument("taint", metavar="KEY[:EFFECT]")
@_version
@formatted
@connected
@pass_invocation
def remove_taint(invocation: Invocation, *, node: str, taint: str, resource_version: int | None) -> None:
    """Take taints off a node again, but for those of its agent's configuration."""
    from hypervisor.ctl.terms import taint_key_of

    key, effect = taint_key_of("KEY[:EFFECT]", taint)
    request = UntaintNodeRequest(node=node, key=key, effect=effect, resource_version=resource_version or 0)
    session = invocation.session()
    run_tasks(invocation, [Task(node, session.cluster.UntaintNode, request)], done="untainted")


@node.command("deregister")
@_nodes
@_version
@formatted
@connected
@pass_invocation
def deregister(invocation: Invocation, *, nodes: Sequence[str], resource_version: int | None) -> None:
    """Remove nodes for good. Their agents must be stopped and nothing may be placed on them."""
    session = invocation.session()
    tasks = [
        Task(
            name,
            session.cluster.DeregisterNode,
            DeregisterNodeRequest(node=name, resource_version=resource_version or 0),
        )
        for name in nodes
    ]
    run_tasks(invocation, tasks, done="deregistered")


node.add_command(drain)


@node.command("evacuate")
@_node
@click.option(
    "--confirm-dead",
    is_flag=True,
    help="You know that nothing runs on the node any more: it is switched off, or its disks are gone.",
)
@click.option("--dry-run", is_flag=True, help="Show where its instances would go, but change nothing.")
@_version
@formatted
@connected
@pass_invocation
def evacuate(
    invocation: Invocation, *, node: str, confirm_dead: bool, dry_run: bool, resource_version: int | None
) -> None:
    """Place the instances of a dead node elsewhere, whatever their policy.

    For a node that is offline and will not come back as it was. Instances are made anew on other nodes, some at once;
    what was on the dead node alone (disks, snapshots) is lost. Those that fit nowhere wait. If the node is not dead,
    they run twice until it is heard of again. Afterwards it can be removed with 'node deregister'.
    """
    from hypervisor.ctl.commands.node_losses import evacuate_node

    evacuate_node(
        invocation,
        node,
        confirm_dead=confirm_dead,
        dry_run=dry_run,
        resource_version=resource_version or 0,
    )


@node.group("fencing")
def fencing() -> None:
    """Whether nodes stop by themselves what could be started elsewhere when no server hears from them."""


@fencing.command("disarm")
@_nodes
@click.option("--reason", metavar="TEXT", default="", help="Shown to others.")
@_version
@formatted
@connected
@pass_invocation
def disarm(
    invocation: Invocation, *, nodes: Sequence[str], reason: str, resource_version: int | None
) -> None:
    """Switch fencing of nodes off, for work on the network: nothing is stopped, and nothing is moved.

    It is in effect once 'node get' shows the fencing as disarmed, with the node's next heartbeat.
    """
    session = invocation.session()
    tasks = [
        Task(
            name,
            session.cluster.SetNodeFencing,
            SetNodeFencingRequest(node=name, reason=reason, resource_version=resource_version or 0),
        )
        for name in nodes
    ]
    run_tasks(invocation, tasks, done="will disarm its fencing with the next heartbeat")


@fencing.command("arm")
@_nodes
@_version
@formatted
@connected
@pass_invocation
def arm(invocation: Invocation, *, nodes: Sequence[str], resource_version: int | None) -> None:
    """Switch fencing of nodes on again."""
    session = invocation.session()
    tasks = [
        Task(
            name,
            session.cluster.SetNodeFencing,
            SetNodeFencingRequest(node=name, armed=True, resource_version=resource_version or 0),
        )
        for name in nodes
    ]
    run_tasks(invocation, tasks, done="will arm its fencing with the next heartbeat")
