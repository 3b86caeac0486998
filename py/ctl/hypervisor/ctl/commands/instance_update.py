"""``instance update``: how much of its node an instance has."""

import click

from hypervisor.ctl import quantities
from hypervisor.ctl.bulk import Task, run_tasks
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, project_option, waiting
from hypervisor.v1.compute_pb2 import UpdateInstanceRequest

__all__ = ["update"]


@click.command("update")
@click.argument("instance", type=NAME("instance"))
@click.option("--cpu", metavar="CORES", help="Processors, such as 2, 0.5 or 500m.")
@click.option("--memory", metavar="SIZE", help="Memory, such as 512MiB or 2GiB.")
@click.option(
    "--if-version",
    "resource_version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only if the instance still has this resource_version.",
)
@waiting
@project_option
@formatted
@connected
@pass_invocation
def update(
    invocation: Invocation,
    *,
    instance: str,
    cpu: str | None,
    memory: str | None,
    resource_version: int | None,
    wait: bool,
    project: str,
) -> None:
    """Change how much processor and memory an instance has.

    A running one gets it at once where its runtime and its guest allow, else it is refused and nothing changes; a
    stopped one has it from its next start.
    """
    if cpu is None and memory is None:
        raise click.UsageError("say what to change: --cpu CORES, --memory SIZE or both")
    request = UpdateInstanceRequest(no_wait=not wait)
    request.instance.name, request.instance.project = instance, project
    request.instance.resource_version = resource_version or 0
    spec = request.instance.spec
    if cpu is not None:
        spec.cpu_cores = quantities.cpu_cores("instance.spec.cpu_cores", cpu)
    if memory is not None:
        spec.memory_mb = quantities.whole_mib("instance.spec.memory_mb", memory)
    session = invocation.session()
    run_tasks(invocation, [Task(instance, session.compute.UpdateInstance, request)], done="updated")
