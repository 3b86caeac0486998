"""``instance pause``, ``resume``, ``suspend``: freezing instances, in memory and on disk, one or several at once."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from hypervisor.ctl.bulk import Task, run_tasks
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, project_option, waiting
from hypervisor.v1.compute_pb2 import PauseInstanceRequest, ResumeInstanceRequest, SuspendInstanceRequest

if TYPE_CHECKING:
    from hypervisor.ctl.session import Session

__all__ = ["pause", "resume", "suspend"]


def _command(
    name: str, request: Any, method: "Callable[[Session], Any]", *, done: str, about: str
) -> click.Command:
    @click.command(name, help=about)
    @click.argument("instances", metavar="INSTANCE...", nargs=-1, required=True, type=NAME("instance"))
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
    def run(
        invocation: Invocation,
        *,
        instances: Sequence[str],
        resource_version: int | None,
        wait: bool,
        project: str,
    ) -> None:
        session = invocation.session()
        tasks = [
            Task(
                instance,
                method(session),
                request(
                    instance=instance,
                    project=project,
                    resource_version=resource_version or 0,
                    no_wait=not wait,
                ),
            )
            for instance in dict.fromkeys(instances)
        ]
        run_tasks(invocation, tasks, done=done)

    return run


pause = _command(
    "pause",
    PauseInstanceRequest,
    lambda session: session.compute.PauseInstance,
    done="paused",
    about="Freeze running instances in memory; 'resume' lets them go on.",
)
resume = _command(
    "resume",
    ResumeInstanceRequest,
    lambda session: session.compute.ResumeInstance,
    done="resumed",
    about="Let paused instances go on.",
)
suspend = _command(
    "suspend",
    SuspendInstanceRequest,
    lambda session: session.compute.SuspendInstance,
    done="suspended",
    about="Write the memory of instances to disk and end them; 'start' goes on from there.",
)
