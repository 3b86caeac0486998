"""``cluster``: info, capacity."""

import click

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import connected, formatted, project_option
from hypervisor.ctl.output import now_s, show_one
from hypervisor.ctl.session import READ_TIMEOUT_S
from hypervisor.v1.cluster_pb2 import GetClusterCapacityRequest, GetClusterInfoRequest

__all__ = ["cluster"]


@click.group()
def cluster() -> None:
    """The cluster as a whole."""


@cluster.command("info")
@formatted
@connected
@pass_invocation
def info(invocation: Invocation) -> None:
    """Show totals, versions and the state of the store."""
    session = invocation.session()
    deadline = invocation.deadline(READ_TIMEOUT_S)
    found = session.read(session.cluster.GetClusterInfo, GetClusterInfoRequest(), deadline=deadline)

    def text() -> str:
        from hypervisor.ctl.display.details import cluster_details

        return cluster_details(found, now_s=now_s())

    show_one(invocation, found, text, name=lambda item: item.cluster_id)


@cluster.command("capacity")
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    required=True,
    help="Describe one instance in YAML, as for 'instance create'; - is standard input. It needs no name.",
)
@click.option(
    "--count-limit",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=100_000,
    show_default=True,
    help="Stop counting at this many.",
)
@click.option(
    "--nodes",
    "max_nodes",
    metavar="N",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="How many nodes to show.",
)
@project_option
@formatted
@connected
@pass_invocation
def capacity(invocation: Invocation, *, file: str, count_limit: int, max_nodes: int, project: str) -> None:
    """Show how many more instances like one fit, and where.

    They are counted as if placed one after another; nothing is made or reserved.
    """
    from hypervisor.ctl.commands.instance_create import read_instances

    instances = read_instances(file, project, named=False)
    if len(instances) > 1:
        raise InvalidArgument.of_field(
            "--file", f"{file} describes {len(instances)} instances: give one", reason="MANIFEST_INVALID"
        )
    session = invocation.session()
    request = GetClusterCapacityRequest(instance=instances[0], count_limit=count_limit, max_nodes=max_nodes)
    found = session.read(
        session.cluster.GetClusterCapacity, request, deadline=invocation.deadline(READ_TIMEOUT_S)
    )

    def text() -> str:
        from hypervisor.ctl.display.placements import capacity_text

        return capacity_text(found)

    show_one(invocation, found, text, name=lambda item: str(item.count))
