"""Lists that follow the cluster (``--watch``).

A list is fetched with the server's own filter and order;
changes then come from events. Without filter and order they are applied here, with them the server is asked again.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from hypervisor.ctl.display.table import Column, render
from hypervisor.ctl.eventstream import EventStream, Follow, Relist
from hypervisor.ctl.invocation import Invocation
from hypervisor.ctl.output import note, now_s, terminal_width, write
from hypervisor.ctl.paging import Listing
from hypervisor.ctl.session import READ_TIMEOUT_S, Deadline, Session
from hypervisor.v1.cluster_pb2 import Event

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from hypervisor.ctl.commands.instance_views import Wanted

__all__ = ["Fetch", "WatchedList", "run_watch", "watch_instances"]

_REDRAW_INTERVAL_S = 0.2
_ALIGNED_WITH = 50

M = TypeVar("M", bound="Message")


class Fetch(Protocol[M]):
    """Lists the objects that are wanted, as the server orders them."""

    def __call__(self, session: Session, deadline: Deadline) -> Listing[M]: ...


@dataclass(frozen=True, slots=True)
class WatchedList(Generic[M]):
    """What :func:`run_watch` needs to know of a kind of object."""

    follow: Follow
    fetch: Fetch[M]
    taken_from: Callable[[Event], M]
    key: Callable[[M], str]
    name: Callable[[M], str]
    columns: Callable[[Sequence[M]], Sequence[Column[M]]]
    narrowed: Callable[[str], Fetch[M]] | None
    """Where a filter or order was given: lists only the object of that id, if the filter lets it through."""


def run_watch(invocation: Invocation, wanted: WatchedList[M]) -> None:
    """Show the list and then each change, until interrupted."""
    in_place = sys.stdout.isatty() and invocation.output in ("table", "wide") and not invocation.quiet
    if in_place:
        _run_on_terminal(invocation, wanted)
    else:
        _run_in_pipe(invocation, wanted)


def _fetched(invocation: Invocation, wanted: WatchedList[M]) -> Listing[M]:
    return wanted.fetch(invocation.session(), Deadline(READ_TIMEOUT_S))


def _stream_after(invocation: Invocation, wanted: WatchedList[M], listing: Listing[M]) -> EventStream:
    """What happens after the list was true."""
    return EventStream(invocation.session(), wanted.follow, after_revision=listing.revision, heard_from=True)


def _run_on_terminal(invocation: Invocation, wanted: WatchedList[M]) -> None:
    listing = _fetched(invocation, wanted)
    shown = {wanted.key(item): item for item in listing}
    drawn = 0
    stream = _stream_after(invocation, wanted, listing)
    drawn = _draw(invocation, wanted, list(shown.values()), drawn)
    last = time.monotonic()
    for event in stream:
        stale = isinstance(event, Relist)
        if isinstance(event, Event) and event.object_id:
            stale = wanted.narrowed is not None
            if not stale:
                _apply_event(shown, event, wanted)
        if stale:
            listing = _fetched(invocation, wanted)
            shown = {wanted.key(item): item for item in listing}
        if isinstance(event, Relist):
            stream.position = listing.revision
        moment = time.monotonic()
        if isinstance(event, Event) and not event.last_of_revision and moment - last < _REDRAW_INTERVAL_S:
            continue
        drawn = _draw(invocation, wanted, list(shown.values()), drawn)
        last = moment


def _apply_event(shown: dict[str, M], event: Event, wanted: WatchedList[M]) -> None:
    if event.type == Event.TYPE_DELETED:
        shown.pop(event.object_id, None)
        return
    is_new = event.object_id not in shown
    shown[event.object_id] = wanted.taken_from(event)
    if is_new:
        ordered = sorted(shown.values(), key=wanted.name)
        shown.clear()
        shown.update((wanted.key(item), item) for item in ordered)


def _draw(invocation: Invocation, wanted: WatchedList[M], items: Sequence[M], drawn: int) -> int:
    """Write the table over the one before; returns its number of lines."""
    import shutil

    size = shutil.get_terminal_size()
    lines = render(
        wanted.columns(items),
        items,
        wide=invocation.output == "wide",
        headers=invocation.headers,
        width=terminal_width(sys.stdout),
    ) or ["(none)"]
    room = max(2, size.lines - 1)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more"]
    up = f"\x1b[{drawn}A" if drawn else ""
    sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()
    return len(lines)


def _run_in_pipe(invocation: Invocation, wanted: WatchedList[M]) -> None:
    listing = _fetched(invocation, wanted)
    _print_rows(invocation, wanted, listing, headers=invocation.headers)
    known = {wanted.key(item): item for item in listing}
    stream = _stream_after(invocation, wanted, listing)
    for event in stream:
        if isinstance(event, Relist):
            note("The history since the last change is gone: the list follows anew.")
            listing = _fetched(invocation, wanted)
            stream.position = listing.revision
            known = {wanted.key(item): item for item in listing}
            _print_rows(invocation, wanted, listing, headers=False)
        elif event.object_id:
            _print_change(invocation, wanted, event, known)


def _print_change(
    invocation: Invocation,
    wanted: WatchedList[M],
    event: Event,
    known: dict[str, M],
) -> None:
    if event.type == Event.TYPE_DELETED:
        if known.pop(event.object_id, None) is None and wanted.narrowed is not None:
            return  # the filter never let it through
    elif wanted.narrowed is not None:
        found = wanted.narrowed(event.object_id)(invocation.session(), Deadline(READ_TIMEOUT_S))
        if not found and known.pop(event.object_id, None) is None:
            return
        if found:
            known[event.object_id] = found[0]
    else:
        known[event.object_id] = wanted.taken_from(event)
    if invocation.output == "json":
        _print_json(event)
    elif invocation.output == "yaml":
        _print_yaml(event)
    elif invocation.quiet:
        write(event.object_name)
    else:
        item = wanted.taken_from(event)
        deleted = event.type == Event.TYPE_DELETED
        # Beside rows that were shown before, so that columns stay where they are.
        rows = [*list(known.values())[:_ALIGNED_WITH], item]
        text = render(wanted.columns([item]), rows, wide=invocation.output == "wide", headers=True)[-1]
        write(f"{text}   (deleted)" if deleted else text)


def _print_rows(
    invocation: Invocation,
    wanted: WatchedList[M],
    items: Sequence[M],
    *,
    headers: bool,
) -> None:
    if invocation.output in ("json", "yaml"):
        for item in items:
            _print_snapshot(invocation, item)
    elif invocation.quiet:
        for item in items:
            write(wanted.name(item))
    else:
        lines = render(wanted.columns(items), items, wide=invocation.output == "wide", headers=headers)
        if lines:
            write("\n".join(lines))


def _print_snapshot(invocation: Invocation, item: Any) -> None:
    """An object at the start, in the form of the events that follow."""
    kind = item.DESCRIPTOR.name.lower()
    event = Event(type=Event.TYPE_SNAPSHOT, kind=kind, object_id=item.id, **{kind: item})
    event.object_name = (
        getattr(item, "name", "") or getattr(item, "hostname", "") or getattr(item, "object_name", "")
    )
    event.revision = item.resource_version
    if invocation.output == "json":
        _print_json(event)
    else:
        _print_yaml(event)


def _print_json(event: Event) -> None:
    from hypervisor.ctl.display import documents

    write(documents.as_json(event, indent=None))


def _print_yaml(event: Event) -> None:
    from hypervisor.ctl.display import documents

    write("---\n" + documents.as_yaml(event))


def watch_instances(invocation: Invocation, wanted: "Wanted") -> None:
    """``instance list --watch``."""
    from hypervisor.ctl.commands.instance_views import hostnames_of
    from hypervisor.ctl.display.columns import instance_columns
    from hypervisor.ctl.paging import joined
    from hypervisor.v1.instance_pb2 import Instance

    session = invocation.session()
    hostnames: dict[str, str] = {}

    def columns(items: Sequence[Instance]) -> Sequence[Column[Instance]]:
        if any(item.node_id and item.node_id not in hostnames for item in items):
            hostnames.update(hostnames_of(session, items))
        return instance_columns(now_s(), hostnames)

    def narrowed(object_id: str) -> Fetch[Instance]:
        return wanted._replace(filter=joined([wanted.filter, f"id={object_id}"])).fetch

    plain = not wanted.filter and not wanted.sort and wanted.limit is None
    run_watch(
        invocation,
        WatchedList(
            follow=Follow(kinds=("instance",), project=wanted.project),
            fetch=wanted.fetch,
            taken_from=lambda event: event.instance,
            key=lambda item: item.id,
            name=lambda item: item.name,
            columns=columns,
            narrowed=None if plain else narrowed,
        ),
    )
