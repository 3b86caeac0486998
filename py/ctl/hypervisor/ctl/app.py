"""The tree of commands at its top."""

import click

from hypervisor.ctl.invocation import Invocation
from hypervisor.ctl.lazygroup import LazyGroup, Place
from hypervisor.ctl.options import connected, formatted

__all__ = ["PROGRAM", "cli"]

PROGRAM = "hypervisor-ctl"
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": False}


@click.group(
    name=PROGRAM,
    cls=LazyGroup,
    context_settings=_HELP,
    places={
        "instance": Place("instances:instance", "Virtual machines, containers and microVMs."),
        "image": Place("images:image", "What instances boot or run."),
        "budget": Place("budgets:budget", "How many instances drains have to leave alone."),
        "node": Place("nodes:node", "The machines that run them."),
        "operation": Place("operations:operation", "What was asked of the cluster, and what became of it."),
        "cluster": Place("cluster:cluster", "The cluster as a whole."),
        "events": Place("events:events", "Show what happens in the cluster, as it happens."),
        "dev": Place("dev:dev", "A whole cluster on this machine, for trying out and for development."),
        "context": Place("contexts:context", "Servers by name, in the configuration file."),
        "completion": Place("completion:completion", "Print the script that lets a shell complete commands."),
        "version": Place("version:version", "Show the version of this program and of the server."),
    },
)
@connected
@formatted
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run virtual machines, containers and microVMs on a Hypervisor cluster.

    The server is chosen by --server or HYPERVISOR_SERVER, else by a context, else it is 127.0.0.1:50051. No cluster
    yet? 'hypervisor-ctl dev up' starts one on this machine.

    Exit codes: 0 done, 1 failure, 2 usage, 3 not found, 4 refused.
    """
    ctx.ensure_object(Invocation)
