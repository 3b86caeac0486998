"""``version``."""

import json

import click

from hypervisor.core.errors import HypervisorError
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import connected, formatted
from hypervisor.ctl.output import write

__all__ = ["version"]

_PATIENCE_S = 2.0


@click.command("version")
@click.option("--client", is_flag=True, help="This program only; do not ask the server.")
@formatted
@connected
@pass_invocation
def version(invocation: Invocation, *, client: bool) -> None:
    """Show the version of this program and of the server."""
    from hypervisor.ctl.release import own_version

    found = {"client": own_version()}
    if not client:
        found |= _server(invocation)
    if invocation.output == "json":
        write(json.dumps(found))
    elif invocation.quiet:
        write(found["client"])
    else:
        for key, value in found.items():
            write(f"{key + ':':<8} {value}")


def _server(invocation: Invocation) -> dict[str, str]:
    from hypervisor.ctl.session import Deadline
    from hypervisor.v1.cluster_pb2 import GetClusterInfoRequest

    session = invocation.session()
    patience = Deadline(_PATIENCE_S if invocation.timeout_s is None else invocation.timeout_s)
    try:
        info = session.read(session.cluster.GetClusterInfo, GetClusterInfoRequest(), deadline=patience)
    except HypervisorError as exc:
        # Which version this program has is an answer even without a server.
        return {"server": f"unknown ({exc})"}
    return {"server": info.version}
