"""``instance start``, ``stop``, ``restart`` and ``delete``: verbs on instances that exist, one or several at once."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from hypervisor.ctl.bulk import Task, run_tasks
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, NAME, connected, formatted, project_option, waiting
from hypervisor.v1.compute_pb2 import (
    DeleteInstanceRequest,
    RestartInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
)
from hypervisor.v1.instance_pb2 import StopOptions

if TYPE_CHECKING:
    from hypervisor.ctl.session import Session

__all__ = ["delete", "restart", "start", "stop"]

_grace = click.option(
    "--grace-period",
    "grace_s",
    type=DURATION,
    metavar="DURATION",
    help="Time between the polite request and the forced end. Default: 10s.",
)
_version = click.option(
    "--if-version",
    "resource_version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only if the instance still has this resource_version.",
)
_names = click.argument("instances", metavar="INSTANCE...", nargs=-1, required=True, type=NAME("instance"))


def _stop_options(grace_s: float | None, *, force: bool) -> StopOptions | None:
    if grace_s is None and not force:
        return None
    options = StopOptions(force=force)
    if grace_s is not None:
        options.grace_period.FromNanoseconds(int(grace_s * 1e9))
    return options


def _run(
    invocation: Invocation, instances: Sequence[str], make: "Callable[[Session, str], Task]", done: str
) -> None:
    session = invocation.session()
    run_tasks(invocation, [make(session, name) for name in dict.fromkeys(instances)], done=done)


@click.command("start")
@_names
@_version
@waiting
@project_option
@formatted
@connected
@pass_invocation
def start(
    invocation: Invocation,
    *,
    instances: Sequence[str],
    resource_version: int | None,
    wait: bool,
    project: str,
) -> None:
    """Start stopped instances."""
    _run(
        invocation,
        instances,
        lambda session, name: Task(
            name,
            session.compute.StartInstance,
            StartInstanceRequest(
                instance=name, project=project, resource_version=resource_version or 0, no_wait=not wait
            ),
        ),
        "started",
    )


@click.command("stop")
@_names
@_grace
@click.option("-f", "--force", is_flag=True, help="Do not ask politely: end it at once.")
@_version
@waiting
@project_option
@formatted
@connected
@pass_invocation
def stop(
    invocation: Invocation,
    *,
    instances: Sequence[str],
    grace_s: float | None,
    force: bool,
    resource_version: int | None,
    wait: bool,
    project: str,
) -> None:
    """Stop instances: politely (SIGTERM, ACPI), and after the grace period by force."""
    _run(
        invocation,
        instances,
        lambda session, name: Task(
            name,
            session.compute.StopInstance,
            StopInstanceRequest(
                instance=name,
                project=project,
                resource_version=resource_version or 0,
                no_wait=not wait,
                stop=_stop_options(grace_s, force=force),
            ),
        ),
        "stopped",
    )


@click.command("restart")
@_names
@_grace
@click.option("-f", "--force", is_flag=True, help="Do not ask politely: end it at once.")
@_version
@waiting
@project_option
@formatted
@connected
@pass_invocation
def restart(
    invocation: Invocation,
    *,
    instances: Sequence[str],
    grace_s: float | None,
    force: bool,
    resource_version: int | None,
    wait: bool,
    project: str,
) -> None:
    """Stop instances, if they run, and start them again on the same node with the same disk."""
    _run(
        invocation,
        instances,
        lambda session, name: Task(
            name,
            session.compute.RestartInstance,
            RestartInstanceRequest(
                instance=name,
                project=project,
                resource_version=resource_version or 0,
                no_wait=not wait,
                stop=_stop_options(grace_s, force=force),
            ),
        ),
        "restarted",
    )


@click.command("delete")
@_names
@_grace
@click.option(
    "-f", "--force", is_flag=True, help="Even if it runs: stop it first, at once unless --grace-period."
)
@_version
@waiting
@project_option
@formatted
@connected
@pass_invocation
def delete(
    invocation: Invocation,
    *,
    instances: Sequence[str],
    grace_s: float | None,
    force: bool,
    resource_version: int | None,
    wait: bool,
    project: str,
) -> None:
    """Remove instances and everything they use. A running one is refused without --force."""
    _run(
        invocation,
        instances,
        lambda session, name: Task(
            name,
            session.compute.DeleteInstance,
            DeleteInstanceRequest(
                instance=name,
                project=project,
                resource_version=resource_version or 0,
                no_wait=not wait,
                force=force,
                stop=_stop_options(grace_s, force=False),
            ),
        ),
        "deleted",
    )
