"""``instance list`` and ``instance get``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from hypervisor.core.errors import HypervisorError, NotFound
from hypervisor.ctl.display.columns import instance_columns
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, listed, project_option, watchable
from hypervisor.ctl.output import now_s, show_list, show_one
from hypervisor.ctl.paging import Listing, joined, list_all
from hypervisor.ctl.session import READ_TIMEOUT_S, Deadline, Session
from hypervisor.v1.compute_pb2 import GetInstanceRequest, ListInstancesRequest

if TYPE_CHECKING:
    from hypervisor.v1.instance_pb2 import Instance
    from hypervisor.v1.node_pb2 import Node

__all__ = ["get_instance", "hostnames_of", "list_instances"]

_MOST_SINGLE_LOOKUPS = 20


class Wanted(NamedTuple):
    """What a list of instances is about."""

    filter: str
    sort: str
    project: str
    limit: int | None

    def fetch(self, session: Session, deadline: Deadline) -> "Listing[Instance]":
        """Ask the server."""
        request = ListInstancesRequest(filter=self.filter, order_by=self.sort, project=self.project)
        return list_all(
            session,
            session.compute.ListInstances,
            request,
            lambda page: page.instances,
            limit=self.limit,
            deadline=deadline,
        )


@click.command("list")
@listed
@click.option("--type", "kind", type=click.Choice(["vm", "container", "microvm"]), help="Only of this type.")
@click.option("--status", metavar="STATUS", help="Only with this status, such as running.")
@click.option("--node", metavar="NODE", type=NAME("node"), help="Only on this node (id or host name).")
@click.option("-l", "--label", "labels", metavar="KEY=VALUE", multiple=True, help="Only with this label.")
@click.option("-p", "--project", metavar="PROJECT", default="", help="Only of this project. Default: all.")
@watchable
@formatted
@connected
@pass_invocation
def list_instances(
    invocation: Invocation,
    *,
    filters: Sequence[str],
    sort: str | None,
    limit: int | None,
    kind: str | None,
    status: str | None,
    node: str | None,
    labels: Sequence[str],
    project: str,
    watch: bool,
) -> None:
    """Show instances.

    Fields for --filter: id, name (a trailing * matches any end), type, status, node_id, desired_state and labels.KEY.
    For --sort: name, created_at, status, type, node_id.
    """
    session = invocation.session()
    conditions = [*filters, *(f"labels.{label}" for label in labels)]
    if kind:
        conditions.append(f"type={kind}")
    if status:
        conditions.append(f"status={status}")
    if node:
        conditions.append(f"node_id={_node_id(session, node)}")
    wanted = Wanted(filter=joined(conditions), sort=sort or "", project=project, limit=limit)
    if watch:
        from hypervisor.ctl.watching import watch_instances

        watch_instances(invocation, wanted)
        return
    found = wanted.fetch(session, invocation.deadline(READ_TIMEOUT_S))
    show_list(
        invocation,
        found,
        lambda: instance_columns(now_s(), hostnames_of(session, found)),
        name=lambda item: item.name,
        empty="No instances. Make one with 'hypervisor-ctl instance create'."
        if wanted == Wanted("", "", "", limit)
        else "No instances match.",
    )


@click.command("get")
@click.argument("instance", type=NAME("instance"))
@project_option
@formatted
@connected
@pass_invocation
def get_instance(invocation: Invocation, *, instance: str, project: str) -> None:
    """Show one instance by name or id, and what its driver cannot do."""
    session = invocation.session()
    request = GetInstanceRequest(instance=instance, project=project)
    found = session.read(session.compute.GetInstance, request, deadline=invocation.deadline(READ_TIMEOUT_S))

    def text() -> str:
        from hypervisor.ctl.display.details import instance_details

        return instance_details(found, node=_node_of(session, found), now_s=now_s())

    show_one(invocation, found, text, name=lambda item: item.name)


def hostnames_of(session: Session, instances: "Sequence[Instance]") -> Mapping[str, str]:
    """Host names by node id, as far as they can be had with little asking; the rest is shown by id."""
    from hypervisor.v1.cluster_pb2 import GetNodeRequest, ListNodesRequest

    wanted = {item.node_id for item in instances if item.node_id}
    if not wanted:
        return {}
    try:
        if len(wanted) == 1:
            node = session.read(session.cluster.GetNode, GetNodeRequest(node=next(iter(wanted))))
            return {node.id: node.hostname}
        page = session.read(session.cluster.ListNodes, ListNodesRequest(page_size=1000))
        known = {node.id: node.hostname for node in page.nodes}
        for node_id in sorted(wanted - set(known))[:_MOST_SINGLE_LOOKUPS]:
            known[node_id] = session.read(session.cluster.GetNode, GetNodeRequest(node=node_id)).hostname
    except HypervisorError:
        return {}  # ids say the same; the list itself must not fail for a prettier column
    return known


def _node_id(session: Session, node: str) -> str:
    """The id of a node given by id or host name."""
    if node.startswith("n-") and len(node) == 28:
        return node
    from hypervisor.v1.cluster_pb2 import GetNodeRequest

    return session.read(session.cluster.GetNode, GetNodeRequest(node=node)).id


def _node_of(session: Session, instance: "Instance") -> "Node | None":
    if not instance.node_id:
        return None
    from hypervisor.v1.cluster_pb2 import GetNodeRequest

    try:
        return session.read(session.cluster.GetNode, GetNodeRequest(node=instance.node_id))
    except NotFound:
        return None  # deregistered since: the instance is shown with the id alone
