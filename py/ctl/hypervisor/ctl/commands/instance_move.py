"""``instance move``: bringing instances to other nodes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hypervisor.ctl.bulk import Task, run_tasks, told
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, NAME, connected, formatted, project_option, waiting
from hypervisor.v1.compute_pb2 import MoveInstanceRequest
from hypervisor.v1.instance_pb2 import MoveStrategy, StopOptions

if TYPE_CHECKING:
    from hypervisor.v1.operation_pb2 import Operation

__all__ = ["STRATEGIES", "move"]

STRATEGIES = ("auto", "live", "replace", "stop")


@click.command("move")
@click.argument("instances", metavar="INSTANCE...", nargs=-1, required=True, type=NAME("instance"))
@click.option("--node", "target", metavar="NODE", default="", help="Where to. Default: what suits best.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="auto",
    help=(
        "live: with its memory, while it runs. replace: a copy runs there before the old one is stopped. stop: stopped "
        "here, then started there. Default: what the instance says, else what its type allows."
    ),
)
@click.option(
    "--allow-disk-loss",
    is_flag=True,
    help="Let go what a machine wrote to its disk, which is local to its node.",
)
@click.option(
    "--healthy-after",
    "healthy_s",
    type=DURATION,
    metavar="DURATION",
    help="How long the copy has to have run before it takes over. Default: what the instance says, else 0s.",
)
@click.option(
    "--grace-period",
    "grace_s",
    type=DURATION,
    metavar="DURATION",
    help="For the copy that has to go: time between the polite request and the forced end. Default: 10s.",
)
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
def move(
    invocation: Invocation,
    *,
    instances: Sequence[str],
    target: str,
    strategy: str,
    allow_disk_loss: bool,
    healthy_s: float | None,
    grace_s: float | None,
    resource_version: int | None,
    wait: bool,
    project: str,
) -> None:
    """Move instances to other nodes. Where that comes to nothing they go on where they are.

    'operation cancel' ends a move that goes on.
    """
    session = invocation.session()
    tasks = []
    for name in dict.fromkeys(instances):
        request = MoveInstanceRequest(
            instance=name,
            project=project,
            node=target,
            strategy=MoveStrategy.Value(f"MOVE_STRATEGY_{strategy.upper()}"),
            allow_disk_loss=allow_disk_loss,
            resource_version=resource_version or 0,
            no_wait=not wait,
        )
        if healthy_s is not None:
            request.healthy_after.FromNanoseconds(int(healthy_s * 1e9))
        if grace_s is not None:
            stop = StopOptions()
            stop.grace_period.FromNanoseconds(int(grace_s * 1e9))
            request.stop.CopyFrom(stop)
        tasks.append(Task(name, session.compute.MoveInstance, request))
    run_tasks(invocation, tasks, done="moved", tell=_told)


def _told(operation: "Operation", done: str) -> str:
    instance = operation.instance
    if not operation.done or not instance.node_id:
        return told(operation, done)
    left = f" ({operation.progress_message})" if operation.progress_message else ""
    return f"{told(operation, done)} to node {instance.node_id}{left}"
