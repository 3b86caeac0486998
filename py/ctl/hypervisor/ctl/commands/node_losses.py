"""``node evacuate``: what becomes of the instances of a dead node."""

import uuid
from typing import TYPE_CHECKING

import click

from hypervisor.ctl.calls import MUTATION_TIMEOUT_S
from hypervisor.ctl.display.table import harmless
from hypervisor.ctl.invocation import Invocation
from hypervisor.ctl.output import show_one
from hypervisor.v1.cluster_pb2 import EvacuateNodeRequest, ListNodesRequest

if TYPE_CHECKING:
    from hypervisor.v1.cluster_pb2 import EvacuateNodeResponse

__all__ = ["evacuate_node"]


def evacuate_node(
    invocation: Invocation, node: str, *, confirm_dead: bool, dry_run: bool, resource_version: int
) -> None:
    """Say that the node is dead, or show what that would do."""
    if not confirm_dead and not dry_run:
        raise click.UsageError(
            "give --confirm-dead if you know that nothing runs on the node any more, or --dry-run to see what would "
            "be done"
        )
    session = invocation.session()
    request = EvacuateNodeRequest(
        request_id=str(uuid.uuid4()),
        node=node,
        confirm_dead=confirm_dead,
        dry_run=dry_run,
        resource_version=resource_version,
    )
    # The request_id makes a repeat safe.
    answer = session.read(
        session.cluster.EvacuateNode, request, deadline=invocation.deadline(MUTATION_TIMEOUT_S)
    )
    hostnames: dict[str, str] = {}
    if answer.moves:
        page = session.read(
            session.cluster.ListNodes,
            ListNodesRequest(page_size=1000),
            deadline=invocation.deadline(MUTATION_TIMEOUT_S),
        )
        hostnames = {one.id: one.hostname for one in page.nodes}
    show_one(invocation, answer, lambda: _text(node, answer, hostnames), name=lambda _: node)


def _text(node: str, answer: "EvacuateNodeResponse", hostnames: dict[str, str]) -> str:
    dry = not answer.HasField("operation")
    if not answer.moves:
        return f"node {node} has no instances" + (" (dry run)" if dry else ": it can be deregistered")
    lines = []
    for move in answer.moves:
        name = harmless(move.instance_name)
        if move.node_id:
            lines.append(f"{name} -> {harmless(hostnames.get(move.node_id, move.node_id))}")
        else:
            lines.append(f"{name}: {harmless(move.reason)}")
    head = "would be done (dry run: nothing was changed)" if dry else "is being done: see 'instance list'"
    return "\n".join([f"node {node}: {len(answer.moves)} instances; this {head}", *lines])
