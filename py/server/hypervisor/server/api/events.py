"""ClusterService.WatchEvents: the view's changes as a stream of events."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from hypervisor.core.clock import Clock
from hypervisor.core.errors import OutOfRange
from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.server.api.encoding import Encoder, encoded_event
from hypervisor.server.api.event_texts import (
    describe_instance,
    describe_node,
    describe_operation,
    recorded_at,
)
from hypervisor.server.api.rpc import Call, Handler, Reply
from hypervisor.server.api.violations import MAX_OBJECT_NAME, Violations
from hypervisor.server.services import ClusterChange, ClusterView, Kind, Versioned
from hypervisor.v1 import cluster_pb2
from hypervisor.wire.times import timestamp_of

__all__ = ["PROGRESS_S", "EventHandlers"]

PROGRESS_S = 10.0
"""A stream that carried nothing for so long tells how far it is."""

_Event = cluster_pb2.Event
_Record = Versioned[Node] | Versioned[Instance] | Versioned[OperationRecord]


@dataclass(frozen=True, slots=True)
class _Filter:
    """Which changes a stream carries."""

    kinds: frozenset[Kind]
    object_id: str
    project: str

    def passes(self, kind: Kind, object_id: str, record: _Record) -> bool:
        if kind not in self.kinds or (self.object_id and object_id != self.object_id):
            return False
        return not self.project or getattr(record.value, "project", None) == self.project


class EventHandlers:
    """The handler by method name: :attr:`handlers`."""

    def __init__(self, view: ClusterView, encoder: Encoder, clock: Clock) -> None:
        self._view = view
        self._encoder = encoder
        self._clock = clock

    @property
    def handlers(self) -> dict[str, Handler]:
        """WatchEvents."""
        return {"WatchEvents": self.watch}

    async def watch(self, request: cluster_pb2.WatchEventsRequest, call: Call) -> AsyncIterator[Reply]:
        wanted = _filter_of(request)
        after: int | None = request.after_revision or None
        if request.send_initial:
            # Taken at once, without waiting in between: one state, true at one revision, and no gap to what follows.
            after = self._view.revision
            snapshot = list(self._snapshot(wanted))
            for reply in map(self._snapshot_event, snapshot):
                yield reply
            yield _Event(type=_Event.TYPE_SYNCED, revision=after, last_of_revision=True)
        elif after is None:
            after = self._view.revision
            yield _progress(after)
        last_sent = self._clock.monotonic()
        try:
            async with aclosing(self._view.changes(after_revision=after)) as batches:
                async for batch in batches:
                    carried = [change for change in batch if self._carries(wanted, change)]
                    for index, change in enumerate(carried, start=1):
                        yield self._event(change, last=index == len(carried))
                    if not carried:
                        silent_s = self._clock.monotonic() - last_sent
                        if batch and silent_s < PROGRESS_S:
                            continue
                        yield _progress(batch[0].revision if batch else self._view.revision)
                    last_sent = self._clock.monotonic()
        except OutOfRange as exc:
            raise OutOfRange(
                f"the history after revision {after} is gone from the store: list again, and watch from the revision "
                "of that list (or watch with send_initial)",
                reason="COMPACTED",
                metadata={"after_revision": str(after), "revision": str(self._view.revision)},
            ) from exc

    def _snapshot(self, wanted: _Filter) -> Iterator[tuple[Kind, str, str, _Record]]:
        for node in self._view.nodes() if Kind.NODE in wanted.kinds else ():
            if wanted.passes(Kind.NODE, node.value.id, node):
                yield Kind.NODE, node.value.id, node.value.hostname, node
        for instance in self._view.instances() if Kind.INSTANCE in wanted.kinds else ():
            if wanted.passes(Kind.INSTANCE, instance.value.id, instance):
                yield Kind.INSTANCE, instance.value.id, instance.value.name, instance
        for operation in self._view.operations() if Kind.OPERATION in wanted.kinds else ():
            if wanted.passes(Kind.OPERATION, operation.value.id, operation):
                yield Kind.OPERATION, operation.value.id, operation.value.object_name, operation

    def _snapshot_event(self, item: tuple[Kind, str, str, _Record]) -> Reply:
        kind, object_id, name, record = item
        event = _Event(
            type=_Event.TYPE_SNAPSHOT,
            revision=record.revision,
            kind=kind.value,
            object_id=object_id,
            object_name=name,
            time=timestamp_of(recorded_at(record.value, created=False, deleted=False)),
        )
        return self._with_object(event, kind, record, newest=True)

    def _carries(self, wanted: _Filter, change: ClusterChange) -> bool:
        record = change.current or change.previous
        return record is not None and wanted.passes(change.kind, change.object_id, record)

    def _event(self, change: ClusterChange, *, last: bool) -> Reply:
        record = cast(_Record, change.current or change.previous)
        before = None if change.previous is None else change.previous.value
        now = None if change.current is None else change.current.value
        match change.kind:
            case Kind.INSTANCE:
                reason, message = describe_instance(cast(Instance | None, before), cast(Instance | None, now))
            case Kind.NODE:
                reason, message = describe_node(cast(Node | None, before), cast(Node | None, now))
            case Kind.OPERATION:
                reason, message = describe_operation(
                    cast(OperationRecord | None, before), cast(OperationRecord | None, now)
                )
        created, deleted = before is None, now is None
        kind = _Event.TYPE_DELETED if deleted else _Event.TYPE_CREATED if created else _Event.TYPE_UPDATED
        event = _Event(
            type=kind,
            revision=change.revision,
            kind=change.kind.value,
            object_id=change.object_id,
            object_name=_name_of(record),
            time=timestamp_of(recorded_at(record.value, created=created, deleted=deleted)),
            reason=reason,
            message=message,
            last_of_revision=last,
        )
        return self._with_object(event, change.kind, record, newest=not deleted)

    def _with_object(self, event: cluster_pb2.Event, kind: Kind, record: _Record, *, newest: bool) -> Reply:
        if kind is Kind.NODE:
            event.node.CopyFrom(self._encoder.node(cast(Versioned[Node], record)))
        elif kind is Kind.OPERATION:
            operation = cast(Versioned[OperationRecord], record)
            event.operation.CopyFrom(self._encoder.operation(operation, bare=True))
        else:
            instance = cast(Versioned[Instance], record)
            if newest:
                return encoded_event(self._encoder.instance_bytes(instance), event)
            event.instance.CopyFrom(self._encoder.instance(instance))
        return event


def _name_of(record: _Record) -> str:
    value = record.value
    if isinstance(value, Node):
        return value.hostname
    return value.name if isinstance(value, Instance) else value.object_name


def _progress(revision: int) -> cluster_pb2.Event:
    return _Event(type=_Event.TYPE_PROGRESS, revision=revision, last_of_revision=True)


def _filter_of(request: cluster_pb2.WatchEventsRequest) -> _Filter:
    wrong = Violations()
    if request.after_revision < 0:
        wrong.add("after_revision", f"is {request.after_revision}: give the revision of a list, or 0 for now")
    known = {kind.value: kind for kind in Kind}
    for index, name in enumerate(request.kinds):
        if name not in known:
            wrong.add(f"kinds[{index}]", f"is not known: use {', '.join(known)}")
            break
    if len(request.object_id) > MAX_OBJECT_NAME:
        wrong.add("object_id", f"is {len(request.object_id)} characters long: give the id of an object")
    if request.project:
        wrong.project("project", request.project)
    wrong.check()
    kinds = frozenset(known[name] for name in request.kinds) or frozenset(Kind)
    return _Filter(kinds, request.object_id, request.project)
