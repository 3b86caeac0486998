"""``instance snapshot``: states of an instance to go back to."""

from typing import Any

import click

from hypervisor.ctl.bulk import Task, run_tasks
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, project_option, waiting
from hypervisor.ctl.output import now_s, show_list
from hypervisor.ctl.session import READ_TIMEOUT_S
from hypervisor.v1.compute_pb2 import (
    CreateSnapshotRequest,
    DeleteSnapshotRequest,
    ListSnapshotsRequest,
    RestoreSnapshotRequest,
)
from hypervisor.v1.instance_pb2 import SNAPSHOT_KIND_DIFF, SNAPSHOT_KIND_FULL

__all__ = ["snapshot"]


@click.group("snapshot")
def snapshot() -> None:
    """States of an instance to go back to: its disk, and its memory where it runs. They stay on its node."""


_instance = click.argument("instance", type=NAME("instance"))
_name = click.argument("name", metavar="SNAPSHOT")


@snapshot.command("create")
@_instance
@_name
@click.option("--diff", is_flag=True, help="Of the memory, keep only what changed since the snapshot before.")
@waiting
@project_option
@formatted
@connected
@pass_invocation
def create(invocation: Invocation, *, instance: str, name: str, diff: bool, wait: bool, project: str) -> None:
    """Keep the present state of an instance, which goes on as it was."""
    request = CreateSnapshotRequest(
        instance=instance,
        project=project,
        snapshot=name,
        kind=SNAPSHOT_KIND_DIFF if diff else SNAPSHOT_KIND_FULL,
        no_wait=not wait,
    )
    _run(invocation, "CreateSnapshot", request, done=f"kept as {name}")


@snapshot.command("list")
@_instance
@project_option
@formatted
@connected
@pass_invocation
def list_snapshots(invocation: Invocation, *, instance: str, project: str) -> None:
    """Show the snapshots of an instance, oldest first."""
    from hypervisor.ctl.display.columns import snapshot_columns

    session = invocation.session()
    request = ListSnapshotsRequest(instance=instance, project=project)
    found = session.read(
        session.compute.ListSnapshots, request, deadline=invocation.deadline(READ_TIMEOUT_S)
    ).snapshots
    show_list(
        invocation,
        found,
        lambda: snapshot_columns(now_s()),
        name=lambda item: item.name,
        empty=f"No snapshots. Make one with 'hypervisor-ctl instance snapshot create {instance} NAME'.",
    )


@snapshot.command("restore")
@_instance
@_name
@waiting
@project_option
@formatted
@connected
@pass_invocation
def restore(invocation: Invocation, *, instance: str, name: str, wait: bool, project: str) -> None:
    """Go back to a snapshot. What happened since is lost; the instance is then as it was when it was taken."""
    request = RestoreSnapshotRequest(instance=instance, project=project, snapshot=name, no_wait=not wait)
    _run(invocation, "RestoreSnapshot", request, done=f"is as it was in {name}")


@snapshot.command("delete")
@_instance
@_name
@waiting
@project_option
@formatted
@connected
@pass_invocation
def delete(invocation: Invocation, *, instance: str, name: str, wait: bool, project: str) -> None:
    """Forget a snapshot."""
    request = DeleteSnapshotRequest(instance=instance, project=project, snapshot=name, no_wait=not wait)
    _run(invocation, "DeleteSnapshot", request, done=f"has forgotten {name}")


def _run(invocation: Invocation, method: str, request: Any, *, done: str) -> None:
    session = invocation.session()
    task = Task(request.instance, getattr(session.compute, method), request)
    run_tasks(invocation, [task], done=done)
