"""``cluster info``."""

import click

from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import connected, formatted
from hypervisor.ctl.output import now_s, show_one
from hypervisor.ctl.session import READ_TIMEOUT_S
from hypervisor.v1.cluster_pb2 import GetClusterInfoRequest

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
