"""Working copies of the cluster in which decisions are made before they are committed.

A *decision* is a pure function of a :class:`Draft`: it reads records, decides, writes records, or raises why not.
Several decisions share one :class:`Batch`, that is one store transaction: each sees what those before it wrote.
Every record a decision has read with :meth:`Draft.get` or written is compared by revision when the batch is committed,
so that a decision made on outdated knowledge is never applied; it is simply made again.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Protocol, TypeVar, cast

import msgspec

from hypervisor.core.errors import Conflict, Internal, ResourceExhausted
from hypervisor.core.model import encode
from hypervisor.core.unknown_members import with_unknown
from hypervisor.server.cluster_state import Update
from hypervisor.server.keys import RecordKey
from hypervisor.server.services import Versioned
from hypervisor.server.store.storage import (
    MAX_COMMIT_BYTES,
    MAX_OPERATIONS,
    MAX_VALUE_BYTES,
    Compare,
    Delete,
    Operation,
    Put,
)

__all__ = ["UNCOMMITTED", "Batch", "Decision", "Draft", "Known", "Shared"]

T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")
S = TypeVar("S", bound="Shared")

UNCOMMITTED = -1
"""Revision of a record that a decision before this one, in the same batch, has written."""

_ENTRY_BYTES = 64
"""What the store's limit counts for each operation and compare besides keys and values."""


class Known(Protocol):
    """The newest records this server knows of."""

    @property
    def revision(self) -> int: ...

    def find(self, key: RecordKey[T]) -> Versioned[T] | None: ...

    def mod_revision(self, path: str) -> int: ...

    def unseen(self) -> Iterable[str]:
        """Keys of which more is known than the watch has told."""
        ...

    def ahead(self, path: str) -> bool:
        """Whether the record is known from the store's answer to a conflict, and the watch has not told of it yet:
        other records of the same change are then not known."""
        ...


class Shared(Protocol):
    """Something the decisions of one batch use together."""

    def admitted(self, draft: "Draft") -> None:
        """Take in what a decision, now part of the batch, wrote."""
        ...


class _Write:
    """A value to be put (``value`` None: to be deleted)."""

    __slots__ = ("data", "lease_id", "unknown", "value")

    def __init__(
        self,
        value: msgspec.Struct | None,
        lease_id: str,
        unknown: Mapping[str, object] | None = None,
    ) -> None:
        self.value = value
        self.lease_id = lease_id
        self.unknown = unknown
        self.data = b"" if value is None else encode(value)
        if unknown is not None:
            self.data = with_unknown(self.data, unknown)


class Batch:
    """Decisions that are committed together, within the limits of one transaction."""

    def __init__(self, known: Known, *, now: datetime) -> None:
        self.known = known
        self.now = now
        self.decisions = 0
        self._compares: dict[str, int] = {}
        self._writes: dict[str, _Write] = {}
        self._bytes = 0
        self._refusals = False
        self._shared: dict[type[Shared], Shared] = {}

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not self._writes and not self._refusals

    @property
    def only_looks(self) -> bool:
        """Whether it changes nothing, and is committed for its compares alone."""
        return not self._writes

    def draft(self) -> "Draft":
        """A working copy for the next decision."""
        return Draft(self)

    def admit(self, draft: "Draft") -> bool:
        """Take the decision's writes in; False when there is no room left for them (commit first)."""
        compares = len(self._compares) + sum(path not in self._compares for path in draft.compares)
        writes = len(self._writes) + sum(path not in self._writes for path in draft.writes)
        added = sum(len(path) + _ENTRY_BYTES + len(w.data) for path, w in draft.writes.items())
        added += sum(2 * len(path) + _ENTRY_BYTES for path in draft.compares)
        full = max(compares, writes) > MAX_OPERATIONS or self._bytes + added > MAX_COMMIT_BYTES
        if full and self.decisions:
            return False
        self._compares.update(draft.compares)
        self._writes.update(draft.writes)
        self._bytes += added
        self.decisions += 1
        for shared in self._shared.values():
            shared.admitted(draft)
        return True

    def admit_refusal(self, draft: "Draft") -> bool:
        """Have what a refusal rests on compared too, so that nobody is refused for what is not so any more; False when
        there is no room left for that."""
        compares = len(self._compares) + sum(path not in self._compares for path in draft.compares)
        added = sum(2 * len(path) + _ENTRY_BYTES for path in draft.compares)
        full = compares > MAX_OPERATIONS or self._bytes + added > MAX_COMMIT_BYTES
        if full and self._compares:
            return False
        self._compares.update(draft.compares)
        self._bytes += added
        self._refusals = self._refusals or bool(draft.compares)
        return True

    def compares(self) -> list[Compare]:
        """What must hold."""
        return [Compare(path, revision) for path, revision in self._compares.items()]

    def operations(self) -> list[Operation]:
        """What is to be written."""
        return [
            Delete(path) if w.value is None else Put(path, w.data, w.lease_id)
            for path, w in self._writes.items()
        ]

    def records(self) -> dict[str, tuple[bytes, msgspec.Struct]]:
        """What is to be written by key, as stored and as a record; not what has more in it than the record tells."""
        return {
            path: (w.data, w.value)
            for path, w in self._writes.items()
            if w.value is not None and w.unknown is None
        }

    def updates(self, revision: int) -> Iterable[Update]:
        """What the commit at ``revision`` wrote."""
        return [
            Update(path, None if w.value is None else Versioned(w.value, revision, w.unknown))
            for path, w in self._writes.items()
        ]

    def written(self, path: str) -> _Write | None:
        """What an earlier decision wrote under the key."""
        return self._writes.get(path)

    def written_paths(self) -> Iterable[str]:
        """The keys that the decisions so far have written."""
        return self._writes.keys()

    def shared(self, kind: type[S], make: Callable[[], S]) -> S:
        """Something all decisions of this batch use, made by the first that asks."""
        found = self._shared.get(kind)
        if found is None:
            found = self._shared[kind] = make()
        return cast(S, found)


class Draft:
    """The working copy one decision sees. Nothing of it remains when the decision raises."""

    __slots__ = ("_batch", "compares", "writes")

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.compares: dict[str, int] = {}
        self.writes: dict[str, _Write] = {}

    @property
    def now(self) -> datetime:
        """When the decision is made."""
        return self._batch.now

    @property
    def batch(self) -> Batch:
        """The batch this belongs to."""
        return self._batch

    def peek(self, key: RecordKey[T]) -> Versioned[T] | None:
        """The record as far as known; it may change before the commit."""
        write = self.writes.get(key.path) or self._batch.written(key.path)
        if write is not None:
            return (
                None if write.value is None else Versioned(cast(T, write.value), UNCOMMITTED, write.unknown)
            )
        return self._batch.known.find(key)

    def get(self, key: RecordKey[T]) -> Versioned[T] | None:
        """The record; the commit fails, and the decision is made again, if it changes before."""
        self._compare(key.path)
        return self.peek(key)

    def put(self, key: RecordKey[T], value: T, *, lease_id: str = "") -> None:
        """Write the record. Too large a one is refused as ``RECORD_TOO_LARGE``.

        Members of the record in its place that this version does not know stay in it.
        """
        self._compare(key.path)
        self._put(key, value, lease_id)

    def create(self, key: RecordKey[T], value: T) -> None:
        """Write a record under a fresh id, which nobody else can have used: nothing to compare."""
        self._put(key, value, "")

    def delete(self, key: RecordKey[T]) -> None:
        """Remove the record."""
        self._compare(key.path)
        self.writes[key.path] = _Write(None, "")

    def guard(self, compare: Compare) -> None:
        """Commit only if ``compare`` (the fence of a leadership) holds.

        Raises ``Conflict`` (``LEADERSHIP_LOST``) when it is known not to.
        """
        known = self._batch.known
        if known.revision >= compare.mod_revision != known.mod_revision(compare.key):
            raise Conflict("this server does not lead any more", reason="LEADERSHIP_LOST")
        self.compares[compare.key] = compare.mod_revision

    def _compare(self, path: str) -> None:
        if path not in self.compares:
            self.compares[path] = self._batch.known.mod_revision(path)

    def _put(self, key: RecordKey[T], value: T, lease_id: str) -> None:
        try:
            known = self.peek(key)
        except Internal:
            known = None  # One that cannot be read is replaced whole.
        write = _Write(value, lease_id, None if known is None else known.unknown)
        if len(write.data) > MAX_VALUE_BYTES:
            raise ResourceExhausted(
                f"the record {key.path} would have {len(write.data)} bytes: at most {MAX_VALUE_BYTES} can be stored",
                reason="RECORD_TOO_LARGE",
                metadata={"bytes": str(len(write.data)), "limit": str(MAX_VALUE_BYTES)},
            )
        self.writes[key.path] = write


class Decision(Protocol[V]):  # type: ignore[misc]
    """Decide on a draft. May be called several times; only the last call counts."""

    def __call__(self, draft: Draft, /) -> V: ...
