"""``events``."""

from collections.abc import Sequence

import click

from hypervisor.core.errors import OutOfRange
from hypervisor.ctl.display.columns import event_columns
from hypervisor.ctl.display.table import render
from hypervisor.ctl.eventstream import EventStream, Follow, Relist
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import connected, formatted
from hypervisor.ctl.output import note, write
from hypervisor.v1.cluster_pb2 import Event

__all__ = ["events"]

_KINDS = ("node", "instance", "operation")
_WIDTH = 10


@click.command("events")
@click.option(
    "--kind", "kinds", type=click.Choice(_KINDS), multiple=True, help="Only these objects; repeatable."
)
@click.option("--object", "object_id", metavar="ID", default="", help="Only the object with this id.")
@click.option(
    "-p", "--project", metavar="PROJECT", default="", help="Only instances and operations of this project."
)
@click.option(
    "--after",
    "after",
    type=click.IntRange(min=0),
    metavar="REVISION",
    help="What happened since this revision, too.",
)
@click.option("--initial", is_flag=True, help="First each object as it is now.")
@formatted
@connected
@pass_invocation
def events(
    invocation: Invocation,
    *,
    kinds: Sequence[str],
    object_id: str,
    project: str,
    after: int | None,
    initial: bool,
) -> None:
    """Show what happens in the cluster, as it happens, until interrupted.

    A lost connection is resumed where it broke. With -o json each event is one line.
    """
    if after and initial:
        raise click.UsageError("--after and --initial exclude each other")
    stream = EventStream(
        invocation.session(),
        Follow(kinds=tuple(kinds), object_id=object_id, project=project),
        after_revision=after or 0,
        send_initial=initial,
    )
    seen = False
    for event in stream:
        if isinstance(event, Relist):
            if after and not seen:
                raise OutOfRange(
                    f"the history after revision {after} is gone: use --initial, or a later revision",
                    reason="COMPACTED",
                    metadata={"after_revision": str(after)},
                )
            note("Warning: events were missed, since the server no longer has that history.")
            continue
        _print(invocation, event, first=not seen)
        seen = True


def _print(invocation: Invocation, event: Event, *, first: bool) -> None:
    if invocation.output in ("json", "yaml"):
        from hypervisor.ctl.display import documents

        if invocation.output == "json":
            write(documents.as_json(event, indent=None))
        else:
            write("---\n" + documents.as_yaml(event))
        return
    if not event.object_id:
        return  # marks of position mean nothing to a person
    if invocation.quiet:
        write(event.object_name or event.object_id)
        return
    wide = invocation.output == "wide"
    lines = render(event_columns(), [event], wide=wide, headers=first and invocation.headers, at_least=_WIDTH)
    write("\n".join(lines))
