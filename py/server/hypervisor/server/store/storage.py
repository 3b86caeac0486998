"""The Storage contract: what every backend promises, and the vocabulary the rest of the server uses.

Vocabulary
----------
*key*        a ``str`` that begins with ``/``, such as ``/hypervisor/instances/i-01h...``; at most
             ``MAX_KEY_BYTES`` bytes of UTF-8 and no NUL. Keys are ordered by their UTF-8 bytes. Others are
             refused with ``InvalidArgument`` (reason ``KEY_INVALID``).
*prefix*     the beginning of a key, not a directory: ``/a/b`` covers ``/a/b``, ``/a/b/c`` and ``/a/bc``; the
             empty prefix covers everything.
*value*      ``bytes``; at most ``MAX_VALUE_BYTES``. A larger one is refused with ``InvalidArgument``
             (reason ``VALUE_TOO_LARGE``) before anything is sent.
*revision*   a positive integer of the whole store, raised by exactly one by every commit that changes
             something (and, rarely, by the store's own bookkeeping: do not count on the absence of gaps).
             All operations of one commit carry the same revision. A key's ``mod_revision`` is the revision
             of its last change, ``create_revision`` that of its creation; it is what ``resource_version``
             shows to users.
*lease*      a time-to-live to which keys are bound. When it runs out or is revoked, its keys are deleted, in
             one commit that watchers see as ordinary deletions.

Guarantees
----------
* ``commit`` is atomic, durable when it returns, and linearizable (compares and writes are one moment).
* Reads (``get``, ``list``) are linearizable unless a backend is asked for a revision in the past.
* A watch delivers every change of its prefix exactly once, in revision order, all changes of one revision
  together in one batch. After a lost connection it resumes by itself from the last *delivered* revision;
  nothing is delivered twice and nothing is left out. Where that is impossible because the history is gone,
  it raises ``Compacted``, and the caller lists again and watches from the revision of that list.
* An operation that failed with ``Unavailable`` has not been applied. When that cannot be known (the answer
  of a commit was lost) ``commit`` settles it by itself; where even that fails it raises ``OutcomeUnknown``.
  A task that is cancelled while it awaits ``commit`` does not learn the outcome; the commit may be applied.

Who may call: any task of the server's event loop, concurrently. Agents never open a store.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from hypervisor.core.errors import DeadlineExceeded, OutOfRange

__all__ = [
    "ABSENT",
    "MAX_COMMIT_BYTES",
    "MAX_KEY_BYTES",
    "MAX_LIST_LIMIT",
    "MAX_OPERATIONS",
    "MAX_VALUE_BYTES",
    "Change",
    "Committed",
    "Compacted",
    "Compare",
    "Conflicted",
    "Delete",
    "Election",
    "Item",
    "Leadership",
    "Lease",
    "Operation",
    "OutcomeUnknown",
    "Page",
    "Put",
    "Storage",
    "WatchBatch",
]

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 1_000_000
"""Below etcd's default request limit of 1.5 MiB with room for the keys and compares of its transaction."""
MAX_OPERATIONS = 120
"""Operations of one commit, and likewise its compares; etcd refuses more than 128 of either by default."""
MAX_COMMIT_BYTES = 1_500_000
"""All keys and values of one commit with 64 bytes for each operation and compare (keys of compares count
twice, as they are read back on a conflict); etcd refuses requests above 1.5 MiB. Refused as
``COMMIT_TOO_LARGE``."""
MAX_LIST_LIMIT = 10_000
"""Items of one page."""

ABSENT = 0
"""``Compare.mod_revision`` of a key that must not exist."""


class OutcomeUnknown(DeadlineExceeded):
    """A commit's answer was lost and reading back was not possible: it may or may not be applied."""

    default_reason = "COMMIT_OUTCOME_UNKNOWN"


class Compacted(OutOfRange):
    """The history asked for is gone, or the revision is not one of this store's (after a restored backup).

    The watch or paged list cannot go on: list again from the start, then watch from the revision of that
    list.
    """

    default_reason = "COMPACTED"


@dataclass(frozen=True, slots=True)
class Item:
    """One key as stored. ``lease_id`` is empty for a key without a lease."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Items in key order and the revision at which they were all true.

    ``next_key`` is where the next page begins (pass it as ``start_key``); empty at the end.
    """

    items: tuple[Item, ...]
    revision: int
    next_key: str = ""


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds when ``key`` was last changed at ``mod_revision`` (``ABSENT``: when it does not exist)."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Write ``value``. With ``lease_id`` the key ends with that lease; without, an earlier binding ends."""

    key: str
    value: bytes
    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove ``key``; nothing happens when it does not exist."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class Committed:
    """The commit was applied; every key it wrote now has this ``mod_revision``.

    A commit that changed nothing (no operation, or only deletes of absent keys) takes no revision of its own;
    ``revision`` is then the store's newest.
    """

    revision: int


@dataclass(frozen=True, slots=True)
class Conflicted:
    """Nothing was written: at least one compare did not hold.

    ``current`` has, for every compared key, its item at ``revision``, or None where it does not exist, so
    that the caller can decide without another read.
    """

    revision: int
    current: Mapping[str, Item | None]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one key.

    ``item`` is None for a deletion; ``previous`` is what was there before (None: nothing, or not asked for).
    """

    key: str
    revision: int
    item: Item | None
    previous: Item | None


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """All changes of the watched prefix at ``revision``.

    ``changes`` may be empty: then it is a progress mark that says everything up to ``revision`` was
    delivered.
    """

    revision: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease. ``ttl_s`` is what the backend really granted, which may be more than was asked."""

    id: str
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Leadership:
    """Proof of leadership: ``fence`` (a Compare on the leader's key) goes into every commit a leader makes.

    A leader that lost its lease without knowing is then refused by the store (a lock alone excludes nobody).
    """

    name: str
    leader_id: str
    fence: Compare


class Election(Protocol):
    """One candidacy. Enter it with ``async with``; leaving resigns.

    ``acquire`` may be called again after ``lost``: the candidate then queues up anew, behind those who wait.
    """

    async def acquire(self) -> Leadership:
        """Wait until this candidate is the leader. Cancel to give up.

        Goes on through outages of the store: a candidate whose lease ended meanwhile queues up anew.
        """
        ...

    async def lost(self) -> None:
        """Return when the leadership is lost (lease gone, key deleted, store unreachable for the TTL)."""
        ...


class Storage(Protocol):
    """See the module's docstring for the vocabulary and the guarantees.

    Errors common to all methods: ``Unavailable`` (reason ``STORE_UNAVAILABLE``, with a retry hint) when the
    backend cannot be reached within its dial or request time-out; ``InvalidArgument`` for keys and values
    outside the limits. ``aclose`` is idempotent; after it every call raises ``Unavailable`` (reason
    ``STORE_CLOSED``).
    """

    async def get(self, key: str) -> Item | None:
        """The item, or None where the key does not exist."""
        ...

    async def list(
        self, prefix: str, *, start_key: str = "", limit: int = 1000, revision: int | None = None
    ) -> Page:
        """Items whose key begins with ``prefix``, in key order, at most ``limit`` (1..10,000).

        ``start_key`` and ``revision`` continue an earlier page: pass its ``next_key`` and ``revision`` and
        the pages together are one consistent view. A backend that cannot read that revision any more raises
        ``Compacted``; begin again.
        """
        ...

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        """Apply all operations if all compares hold, else none.

        At most ``MAX_OPERATIONS`` operations, no key twice among them (``DUPLICATE_KEY``). Raises
        ``NotFound`` (reason ``LEASE_NOT_FOUND``) when a Put names a lease that has ended; nothing is written
        then. Compares are looked at first: a commit with a failed compare and an ended lease is
        ``Conflicted``.
        """
        ...

    def watch(
        self, prefix: str, *, after_revision: int, with_previous: bool = True
    ) -> AsyncGenerator[WatchBatch, None]:
        """Changes of the prefix with a revision greater than ``after_revision``, for ever.

        Without ``with_previous`` the changes need not carry what was there before: for consumers that know it, as
        some backends have to look it up for every change.

        An unreachable backend is retried until it is back. Close the iterator (``aclose``;
        ``contextlib.aclosing`` does it) or cancel its task to end it. Raises ``Compacted``. A consumer that
        is slow delays only itself: it is either held back or disconnected and resumed, never given a gap.
        """
        ...

    async def grant_lease(self, ttl_s: float) -> Lease:
        """A new lease that ends after ``ttl_s`` seconds (at least 1) unless kept alive.

        A restart of the backend gives every lease a whole ``ttl_s`` again, so leases may end late, never
        early.
        """
        ...

    async def keep_alive(self, lease_id: str) -> float:
        """Renew the lease; returns the seconds it now has.

        Raises ``NotFound`` (``LEASE_NOT_FOUND``) when it has ended.
        """
        ...

    async def revoke_lease(self, lease_id: str) -> None:
        """End the lease now and delete its keys. Nothing happens when it has ended already."""
        ...

    def election(
        self, name: str, candidate_id: str, *, ttl_s: float
    ) -> AbstractAsyncContextManager[Election]:
        """A candidacy for the leadership ``name``; candidates lead one at a time, in the order they came."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget the history before ``revision`` (current values stay).

        Afterwards ``watch(after_revision=r)`` and ``list(revision=r)`` raise ``Compacted`` for ``r <
        revision`` and work for ``r >= revision``. Nothing happens when that much is forgotten already. Raises
        ``InvalidArgument`` for a revision greater than the newest.
        """
        ...

    async def current_revision(self) -> int:
        """The store's newest revision (0, with etcd 1, for a store that was never written)."""
        ...

    async def aclose(self) -> None:
        """End watches, leases' keep-alive tasks and connections."""
        ...
