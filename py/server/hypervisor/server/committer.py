"""Group commit: decisions that are waiting while a transaction is in flight go into the next one together.

There are two lanes, each a loop that makes and commits its batches one after another, so that its decisions never
conflict with each other: placements, which all change the allocations of nodes, and everything else. So while one
transaction waits for the disk, decisions that have nothing to do with it go on. Where the lanes do meet on a record,
they meet as two servers do: when another was faster (``Conflicted``) the records that moved are taken from the store's
answer and all decisions of the batch are made again, refusals included: a refusal, too, rests on what was known, and
that is compared as well, so that a server that is behind, or cut off from the store, refuses nobody by mistake.
"""

import asyncio
import enum
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import msgspec
import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Internal, InvalidArgument, NotFound, Unavailable
from hypervisor.server.cluster_state import Update, decode_item
from hypervisor.server.drafts import Batch, Decision
from hypervisor.server.failures import copy_of
from hypervisor.server.keys import RecordKey
from hypervisor.server.services import Versioned
from hypervisor.server.store.storage import Committed, Conflicted, Item, OutcomeUnknown, Storage
from hypervisor.server.view import StoreView

__all__ = ["CommitListener", "CommitOutcome", "Decided", "GroupCommitter", "Knowledge", "Lane"]

T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")

_MAX_ATTEMPTS = 64
_CALM_ATTEMPTS = 3
"""Conflicts in a row after which the committer pauses, so that two servers do not chase each other."""

log = structlog.get_logger(__name__)


class Lane(enum.Enum):
    """Decisions of different lanes are committed independently of each other."""

    RECORDS = "records"
    PLACEMENTS = "placements"
    """Decisions that change what is reserved on nodes."""


class CommitOutcome(enum.Enum):
    """What became of a transaction."""

    COMMITTED = "committed"
    CONFLICTED = "conflicted"
    """Another server was faster: its decisions are made again."""
    FAILED = "failed"


CommitListener = Callable[[Lane, CommitOutcome, float, int], None]
"""Told of a transaction: its lane, its outcome, how many seconds the store took, how many decisions were in it."""


@dataclass(frozen=True, slots=True)
class Decided(Generic[V]):
    """A decision that was made on ``revision``; what it wrote, if anything, has this revision."""

    value: V
    revision: int


@dataclass(slots=True, eq=False)
class _Entry:
    decision: Decision[Any]
    then: Callable[[Any, int], None] | None
    future: asyncio.Future[Decided[Any]]
    alone: bool = False
    attempts: int = 0
    outcome: Any = None
    error: Exception | None = field(default=None)
    asked: dict[str, int] = field(default_factory=dict)
    """Revisions of keys, as the store has told them since this decision was asked for. The view may have lost them."""


class Knowledge:
    """The view, and over it what this server has learned from its own commits and the view has not seen yet."""

    def __init__(self, view: StoreView) -> None:
        self._view = view
        self._learned: dict[str, tuple[int, Update, int]] = {}
        self._heard: dict[str, int] = {}

    @property
    def revision(self) -> int:
        """Newest revision of which something is known."""
        return max((at for at, _, _ in self._learned.values()), default=self._view.revision)

    def find(self, key: RecordKey[T]) -> Versioned[T] | None:
        """The record as last known. Raises ``Internal`` where it cannot be read."""
        learned = self._newer(key.path) if self._learned else None
        if learned is None:
            return self._view.find(key)
        if learned[1].error is not None:
            raise learned[1].error
        return cast("Versioned[T] | None", learned[1].record)

    def mod_revision(self, path: str) -> int:
        """Its revision; 0 where it does not exist."""
        learned = self._newer(path) if self._learned else None
        return self._view.mod_revision(path) if learned is None else learned[2]

    def unseen(self) -> Iterable[str]:
        """Keys of which something is known that the view has not seen."""
        return self._learned.keys()

    def ahead(self, path: str) -> bool:
        """Whether the record is known from a conflict alone, and the view does not have it yet."""
        return self._heard.get(path, 0) > self._view.revision

    def learn_commit(self, revision: int, updates: Iterable[Update]) -> None:
        """This server's commit wrote ``updates``."""
        self._view.offer(revision, updates)
        if self._view.revision < revision:
            for update in updates:
                self._learn(revision, update, 0 if update.deleted else revision)

    def learn_items(self, revision: int, current: Mapping[str, Item | None]) -> None:
        """The store said what these keys hold at ``revision``."""
        for path, item in current.items():
            if revision > self._view.revision:
                modified = 0 if item is None else item.mod_revision
                if modified > self._view.revision:
                    self._heard[path] = modified
                self._learn(revision, decode_item(path, item), modified)

    def forget_seen(self) -> None:
        """Drop what the view has seen by now."""
        if self._learned:
            seen = self._view.revision
            self._learned = {p: entry for p, entry in self._learned.items() if entry[0] > seen}
            self._heard = {p: modified for p, modified in self._heard.items() if modified > seen}

    def _learn(self, revision: int, update: Update, mod_revision: int) -> None:
        # The answers of two lanes may come in either order.
        known = self._learned.get(update.path)
        if known is None or known[0] < revision:
            self._learned[update.path] = (revision, update, mod_revision)

    def _newer(self, path: str) -> tuple[int, Update, int] | None:
        learned = self._learned.get(path)
        return learned if learned is not None and learned[0] > self._view.revision else None


class GroupCommitter:
    """Makes decisions and commits them; see the module's docstring. ``run`` must be running."""

    def __init__(
        self,
        storage: Storage,
        view: StoreView,
        clock: Clock,
        *,
        rng: random.Random,
        queue_limit: int = 20_000,
    ) -> None:
        self._storage = storage
        self._view = view
        self._clock = clock
        self._rng = rng
        self._queue_limit = queue_limit
        self._queues: dict[Lane, deque[_Entry]] = {lane: deque() for lane in Lane}
        self._wakes = {lane: asyncio.Event() for lane in Lane}
        self._closed = False
        self.known = Knowledge(view)
        self.commits = 0
        self.decisions = 0
        self._listeners: list[CommitListener] = []

    def on_commit(self, listener: "CommitListener") -> None:
        """Call ``listener`` after each transaction that was sent to the store; it must not block."""
        self._listeners.append(listener)

    def find(self, key: RecordKey[T]) -> Versioned[T] | None:
        """The record as last known, this server's own commits included."""
        return self.known.find(key)

    async def commit(
        self,
        decision: Decision[V],
        *,
        then: Callable[[V, int], None] | None = None,
        lane: Lane = Lane.RECORDS,
        even_restoring: bool = False,
    ) -> Decided[V]:
        """Make the decision and commit it; raises what the decision raises.

        The lane is a matter of speed alone: a decision is right in either.

        ``then(value, revision)`` is called right after the commit, even when the caller was cancelled meanwhile.
        A caller that is cancelled before its decision was begun withdraws it. ``Unavailable`` when the store cannot
        be reached, a backup is being restored (``CLUSTER_RESTORING``, but for decisions that do not touch its records:
        ``even_restoring``), too many wait (``SERVER_BUSY``) or this server stops before its turn; ``OutcomeUnknown``
        as in the storage contract, and when this server stops while its transaction is under way.
        """
        if self._closed:
            raise _stopping()
        if self._view.restoring and not even_restoring:
            raise _restoring()
        waiting = sum(map(len, self._queues.values()))
        if waiting >= self._queue_limit:
            raise Unavailable(
                f"{waiting} changes wait for the store already: try again later",
                reason="SERVER_BUSY",
                metadata={"waiting": str(waiting)},
                retry_after_s=1.0,
            )
        future: asyncio.Future[Decided[Any]] = asyncio.get_running_loop().create_future()
        self._queues[lane].append(_Entry(decision, then, future))
        self._wakes[lane].set()
        return cast("Decided[V]", await future)

    async def run(self) -> None:
        """Commit until cancelled; what is waiting then fails with ``Unavailable`` (``SERVER_STOPPING``)."""
        try:
            await self._view.loaded()
            async with asyncio.TaskGroup() as group:
                for lane in Lane:
                    group.create_task(self._run_lane(lane), name=f"commit-{lane.value}")
        finally:
            self._closed = True
            for queue in self._queues.values():
                for entry in queue:
                    if not entry.future.done():
                        entry.future.set_exception(_stopping())
                queue.clear()

    async def _run_lane(self, lane: Lane) -> None:
        queue, wake = self._queues[lane], self._wakes[lane]
        while True:
            await wake.wait()
            wake.clear()
            while queue:
                await self._commit_next(lane)

    async def _commit_next(self, lane: Lane) -> None:
        self.known.forget_seen()
        queue = self._queues[lane]
        batch = Batch(self.known, now=self._clock.now())
        entries = self._fill(batch, queue)
        if batch.empty:
            self._resolve(entries, self.known.revision)
            return
        self._view.expect(lane.value, batch.records())
        started = self._clock.monotonic()
        try:
            outcome = await self._storage.commit(batch.compares(), batch.operations())
        except HypervisorError as exc:
            self._tell(lane, CommitOutcome.FAILED, started, decisions=len(entries))
            self._failed(entries, exc, queue)
            return
        except asyncio.CancelledError:
            # The store does not take a transaction back that was sent.
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_exception(_interrupted())
            raise
        match outcome:
            case Committed(revision):
                self.commits += 1
                self.decisions += len(entries)
                self._tell(lane, CommitOutcome.COMMITTED, started, decisions=len(entries))
                if not batch.only_looks:
                    # What only compares takes no revision of its own: it is told another one's.
                    self.known.learn_commit(revision, tuple(batch.updates(revision)))
                self._resolve(entries, revision)
            case Conflicted(revision, current):
                self._tell(lane, CommitOutcome.CONFLICTED, started, decisions=len(entries))
                self.known.learn_items(revision, current)
                for entry in entries:
                    entry.asked.update((k, 0 if i is None else i.mod_revision) for k, i in current.items())
                if lane is Lane.PLACEMENTS:
                    await self._catch_up(revision)
                await self._again(entries, queue)

    def _tell(self, lane: Lane, outcome: CommitOutcome, started: float, *, decisions: int) -> None:
        seconds = self._clock.monotonic() - started
        for listener in self._listeners:
            listener(lane, outcome, seconds, decisions)

    def _fill(self, batch: Batch, queue: deque[_Entry]) -> list[_Entry]:
        taken: list[_Entry] = []
        while queue:
            entry = queue[0]
            if entry.future.done():
                queue.popleft()
                continue
            if entry.alone and taken:
                break
            draft = batch.draft()
            entry.outcome, entry.error = None, None
            try:
                entry.outcome = entry.decision(draft)
            except HypervisorError as exc:
                entry.error = exc
                if not draft.compares.items() <= entry.asked.items() and not batch.admit_refusal(draft):
                    break
            except Exception as exc:  # a defect in one decision must not end everybody's commits
                log.exception("decision_failed")
                entry.error = Internal(f"a decision failed: {exc!r}")
            else:
                if not batch.admit(draft):
                    break
            queue.popleft()
            taken.append(entry)
            if entry.alone:
                break
        return taken

    def _resolve(self, entries: Iterable[_Entry], revision: int) -> None:
        for entry in entries:
            if entry.error is None and entry.then is not None:
                entry.then(entry.outcome, revision)
            if entry.future.done():
                continue
            if entry.error is not None:
                entry.future.set_exception(entry.error)
            else:
                entry.future.set_result(Decided(entry.outcome, revision))

    def _failed(self, entries: list[_Entry], error: HypervisorError, queue: deque[_Entry]) -> None:
        if isinstance(error, InvalidArgument | NotFound) and len(entries) > 1:
            # One of them is at fault (a lease that ended, a record too large): the others shall not suffer.
            for entry in entries:
                entry.alone = True
            queue.extendleft(reversed(entries))
            return
        self._view.suspect()
        log.warning("commit_failed", reason=error.reason, error=str(error), decisions=len(entries))
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(copy_of(error))

    async def _catch_up(self, revision: int) -> None:
        """Placements rest on more than they compare (instances that are there): see what moved before the next try."""
        try:
            await self._view.wait_revision(revision)
        except Unavailable:
            # The decisions look themselves whether they can do without.
            log.warning("view_behind_conflict", revision=revision, seen=self._view.revision)

    async def _again(self, entries: list[_Entry], queue: deque[_Entry]) -> None:
        for entry in entries:
            entry.attempts += 1
        worn_out = [e for e in entries if e.attempts >= _MAX_ATTEMPTS]
        if worn_out:
            # Contention as long as that is unheard of: rather does the view miss a change.
            self._view.distrust()
        for entry in worn_out:
            if not entry.future.done():
                entry.future.set_exception(
                    Unavailable(
                        "others keep changing the same records: try again",
                        reason="STORE_CONTENTION",
                        retry_after_s=1.0,
                    )
                )
        queue.extendleft(reversed([e for e in entries if e.attempts < _MAX_ATTEMPTS]))
        attempts = max(e.attempts for e in entries)
        if attempts > _CALM_ATTEMPTS:
            await self._clock.sleep(self._rng.random() * min(0.001 * 2.0**attempts, 0.1))


def _stopping() -> Unavailable:
    return Unavailable(
        "this server is stopping: try another one", reason="SERVER_STOPPING", retry_after_s=1.0
    )


def _restoring() -> Unavailable:
    return Unavailable(
        "a backup of the cluster is being restored: try again when that is done; one that broke off is finished by "
        "'cluster restore' with the same file",
        reason="CLUSTER_RESTORING",
        retry_after_s=1.0,
    )


def _interrupted() -> OutcomeUnknown:
    return OutcomeUnknown(
        "this server stopped while the change was being written: it may or may not be recorded; look before a retry, "
        "or repeat the call with its request_id",
        retry_after_s=1.0,
    )
