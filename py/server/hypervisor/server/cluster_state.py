"""The cluster in memory: all records of the store at one revision, with indexes. Pure: no store, no clock, no tasks.

:class:`ClusterState` is changed by :meth:`ClusterState.apply` alone, one revision at a time; ``view.py`` feeds it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
import structlog

from hypervisor.core.errors import Internal
from hypervisor.core.images import Image
from hypervisor.core.model import Allocation, Instance, Node, OperationRecord, decode, encode
from hypervisor.core.unknown_members import find_unknown
from hypervisor.server import keys
from hypervisor.server.draining.records import Budget, DrainRecord
from hypervisor.server.keys import RecordKey
from hypervisor.server.records import ServerRecord
from hypervisor.server.services import ClusterChange, Kind, Versioned
from hypervisor.server.store.storage import Item

__all__ = ["ClusterState", "Update", "cluster_changes", "decode_item"]

T = TypeVar("T", bound=msgspec.Struct)

log = structlog.get_logger(__name__)

_KINDS: Mapping[type[msgspec.Struct], Kind] = {
    Node: Kind.NODE,
    Instance: Kind.INSTANCE,
    OperationRecord: Kind.OPERATION,
}


@dataclass(frozen=True, slots=True)
class Update:
    """What a key holds from a revision on: ``record`` is None for a deletion.

    ``error`` says that the value is there and cannot be read; ``raw`` is the text of a key that is not a record.
    """

    path: str
    record: Versioned[Any] | None
    error: Internal | None = None
    raw: str | None = None
    create_revision: int = 0
    mod_revision: int = 0

    @property
    def deleted(self) -> bool:
        """Whether the key is gone."""
        return self.record is None and self.error is None and self.raw is None


def decode_item(path: str, item: Item | None) -> Update:
    """The update that a key's item makes. A value that cannot be read is kept as its error, never guessed."""
    if item is None:
        return Update(path, None)
    key = keys.parse(path)
    if key is None:
        return Update(
            path,
            None,
            raw=item.value.decode(errors="replace"),
            create_revision=item.create_revision,
            mod_revision=item.mod_revision,
        )
    try:
        record = decode(key.kind, item.value, key=path)
        unknown = find_unknown(item.value, encode(record))
        return Update(path, Versioned(record, item.mod_revision, unknown))
    except Internal as exc:
        log.error("record_unreadable", key=path, revision=item.mod_revision, error=str(exc))
        return Update(path, None, error=exc, mod_revision=item.mod_revision)


def cluster_changes(
    revision: int, pairs: Iterable[tuple[Versioned[Any] | None, Versioned[Any] | None]]
) -> tuple[ClusterChange, ...]:
    """Changes (current, previous) of nodes, instances and operations; other records have no events."""
    found = []
    for current, previous in pairs:
        one = current or previous
        if one is None:
            continue
        kind = _KINDS.get(type(one.value))
        if kind is not None:
            found.append((kind, one.value.id, current, previous))
    last = len(found) - 1
    return tuple(
        ClusterChange(
            kind=kind,
            object_id=object_id,
            revision=revision,
            current=current,
            previous=previous,
            last_of_revision=index == last,
        )
        for index, (kind, object_id, current, previous) in enumerate(found)
    )


class ClusterState:
    """All records at ``revision``. Keys not under the prefix are not its business."""

    def __init__(self) -> None:
        self.revision = 0
        self._records: dict[str, Versioned[Any]] = {}
        self._unreadable: dict[str, tuple[int, Internal]] = {}
        self._candidates: dict[str, tuple[int, str]] = {}
        self.nodes: dict[str, Versioned[Node]] = {}
        self.instances: dict[str, Versioned[Instance]] = {}
        self.operations: dict[str, Versioned[OperationRecord]] = {}
        self.unfinished: dict[str, Versioned[OperationRecord]] = {}
        self.allocations: dict[str, Versioned[Allocation]] = {}
        self.images: dict[str, Versioned[Image]] = {}
        self.drains: dict[str, Versioned[DrainRecord]] = {}
        self.budgets: dict[tuple[str, str], Versioned[Budget]] = {}
        self.image_names: dict[str, dict[str, str]] = {}
        """Of the images with some content (by digest): their names by id."""
        self._instances_on: dict[str, dict[str, None]] = {}
        self._servers: dict[str, Versioned[ServerRecord]] = {}
        self._hostnames: dict[str, dict[str, None]] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._requests: dict[str, dict[str, None]] = {}

    def find(self, key: RecordKey[T]) -> Versioned[T] | None:
        """The record. Raises ``Internal`` (``RECORD_UNREADABLE``) where there is one that cannot be read."""
        found = self._records.get(key.path)
        if found is None and key.path in self._unreadable:
            raise self._unreadable[key.path][1]
        return cast("Versioned[T] | None", found)

    def mod_revision(self, path: str) -> int:
        """Revision of the last change of a record or a candidate's key; 0 where there is none."""
        found = self._records.get(path)
        if found is not None:
            return found.revision
        if path in self._unreadable:
            return self._unreadable[path][0]
        return self._candidates.get(path, (0, ""))[0]

    def paths(self) -> Iterator[tuple[str, int]]:
        """Every key held (records, unreadable ones, candidates) and its mod_revision."""
        for path, record in self._records.items():
            yield path, record.revision
        for path, (revision, _) in self._unreadable.items():
            yield path, revision
        for path, (revision, _) in self._candidates.items():
            yield path, revision

    def instance_named(self, project: str, name: str) -> Versioned[Instance] | None:
        """The instance with this name in the project."""
        instance_id = self._names.get((project, name))
        return None if instance_id is None else self.instances.get(instance_id)

    def instances_on(self, node_id: str) -> Iterator[Versioned[Instance]]:
        """Instances placed on the node."""
        return (self.instances[i] for i in self._instances_on.get(node_id, ()))

    def node_named(self, hostname: str) -> Versioned[Node] | None:
        """The node with this host name."""
        return next((self.nodes[n] for n in self._hostnames.get(hostname, ())), None)

    def operation_of_request(self, request_id: str) -> Versioned[OperationRecord] | None:
        """The newest operation begun with this request id (callers may have used the same one)."""
        found = [self.operations[o] for o in self._requests.get(request_id, ())]
        return max(found, key=lambda o: o.value.started_at, default=None)

    def servers(self) -> tuple[ServerRecord, ...]:
        """Servers that are alive."""
        return tuple(r.value for r in self._servers.values())

    def leader_id(self) -> str:
        """Id of the server that leads; empty while none does."""
        return min(self._candidates.values(), default=(0, ""))[1]

    def apply(self, revision: int, updates: Iterable[Update]) -> tuple[ClusterChange, ...]:
        """Move to ``revision``; returns what users can see of it."""
        pairs = []
        for update in updates:
            previous = self._records.get(update.path)
            if previous is not None:
                self._unindex(update.path, previous)
            self._unreadable.pop(update.path, None)
            if update.error is not None:
                self._unreadable[update.path] = (update.mod_revision, update.error)
            elif update.raw is not None:
                if update.path.startswith(keys.LEADER_PREFIX):
                    self._candidates[update.path] = (update.create_revision, update.raw)
            elif update.record is not None:
                self._index(update.path, update.record)
            else:
                self._candidates.pop(update.path, None)
            pairs.append((update.record, previous))
        self.revision = max(self.revision, revision)
        return cluster_changes(revision, pairs)

    def _index(self, path: str, record: Versioned[Any]) -> None:
        self._records[path] = record
        match record.value:
            case Instance() as i:
                self.instances[i.id] = record
                self._names[i.project, i.name] = i.id
                if i.node_id:
                    self._instances_on.setdefault(i.node_id, {})[i.id] = None
            case OperationRecord() as o:
                self.operations[o.id] = record
                if not o.done:
                    self.unfinished[o.id] = record
                if o.request_id:
                    self._requests.setdefault(o.request_id, {})[o.id] = None
            case Node() as n:
                self.nodes[n.id] = record
                self._hostnames.setdefault(n.hostname, {})[n.id] = None
            case Allocation() as a:
                self.allocations[a.node_id] = record
            case ServerRecord() as server:
                self._servers[server.id] = record
            case DrainRecord() as drain:
                self.drains[drain.node_id] = record
            case Budget() as budget:
                self.budgets[budget.project, budget.name] = record
            case Image() as image:
                self.images[image.id] = record
                self.image_names.setdefault(image.sha256, {})[image.id] = image.name
            case _:
                pass

    def _unindex(self, path: str, record: Versioned[Any]) -> None:
        del self._records[path]
        match record.value:
            case Instance() as i:
                del self.instances[i.id]
                if self._names.get((i.project, i.name)) == i.id:
                    del self._names[i.project, i.name]
                _discard(self._instances_on, i.node_id, i.id)
            case OperationRecord() as o:
                del self.operations[o.id]
                self.unfinished.pop(o.id, None)
                _discard(self._requests, o.request_id, o.id)
            case Node() as n:
                del self.nodes[n.id]
                _discard(self._hostnames, n.hostname, n.id)
            case Allocation() as a:
                del self.allocations[a.node_id]
            case ServerRecord() as server:
                del self._servers[server.id]
            case DrainRecord() as drain:
                del self.drains[drain.node_id]
            case Budget() as budget:
                del self.budgets[budget.project, budget.name]
            case Image() as image:
                del self.images[image.id]
                names = self.image_names[image.sha256]
                del names[image.id]
                if not names:
                    del self.image_names[image.sha256]
            case _:
                pass


def _discard(index: dict[str, dict[str, None]], key: str, member: str) -> None:
    members = index.get(key)
    if members is not None:
        members.pop(member, None)
        if not members:
            del index[key]
