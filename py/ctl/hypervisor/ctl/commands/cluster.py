"""``cluster``: info, capacity, backup, restore."""

from pathlib import Path

import click

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import connected, formatted, project_option
from hypervisor.ctl.output import note, now_s, show_one
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


@cluster.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Replace FILE where it exists.")
@connected
@pass_invocation
def backup(invocation: Invocation, *, file: Path, replace: bool) -> None:
    """Write all records of the cluster to FILE; - is standard output.

    They are true at one moment; the cluster goes on meanwhile. FILE is for its owner only: it has what users gave in
    specifications, such as user data of cloud-init. Disks, memory, snapshots and the content of images are not in it.
    """
    from hypervisor.core.backup_file import read_backup
    from hypervisor.ctl.cluster_backup import fetch_backup, write_backup

    data = fetch_backup(invocation.session(), deadline=invocation.deadline(None))
    write_backup(file, data, replace=replace)
    header, records, _ = read_backup(data)
    note(f"{len(records)} records of {header.cluster_id} at revision {header.revision}")


@cluster.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--check", is_flag=True, help="Only say what FILE is and whether it is whole; no server is asked."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@formatted
@connected
@pass_invocation
def restore(invocation: Invocation, *, file: Path, check: bool, yes: bool) -> None:
    """Put the records of FILE, which 'cluster backup' made, into a cluster that was just begun.

    Stop all servers, put their store aside, start one server and run this. It is all or nothing: until it is done the
    cluster takes no other change, and one that broke off is finished by running it again. Agents need no restart: they
    register anew, and what they run goes on.
    """
    from hypervisor.ctl.cluster_backup import load_backup, send_backup

    data, header, records = load_backup(file)
    made = f"{header.made_at:%Y-%m-%d %H:%M:%S} UTC"
    what = f"{len(records)} records of {header.cluster_id} at revision {header.revision}, made {made}"
    if check:
        note(f"whole: {what}")
        return
    if not yes:
        click.confirm(f"Restore {what}?", abort=True, err=True)
    found = send_backup(invocation.session(), data, deadline=invocation.deadline(None))

    def text() -> str:
        return f"restored {found.instances} instances and {found.nodes} nodes of {found.cluster_id}, as of {made}"

    show_one(invocation, found, text, name=lambda item: item.cluster_id)
