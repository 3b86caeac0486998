"""Leader election on top of any Storage: the oldest living key among the candidates' lease-bound keys leads.

Every candidate puts one key below ``/hypervisor/elections/<name>/`` bound to a lease of its own; the one
with the lowest ``create_revision`` is the leader, the others wait for a key before theirs to go. A lease
alone excludes nobody (its holder may be paused past the end of it), therefore a leader adds its fence to
every commit.
"""

import asyncio
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, InvalidArgument, NotFound
from hypervisor.server.store.storage import (
    ABSENT,
    Committed,
    Compacted,
    Compare,
    Leadership,
    Put,
    Storage,
)
from hypervisor.server.store.validation import check_key, check_ttl

__all__ = ["ELECTION_PREFIX", "Candidacy"]

ELECTION_PREFIX = "/hypervisor/elections/"

_RESIGN_TIMEOUT_S = 5.0
_RETRY_S = 0.2

log = structlog.get_logger(__name__)


class Candidacy:
    """One candidate; implements ``Election`` and the context manager that ``Storage.election`` returns.

    Owns one task, which keeps the lease alive; it starts with a lease and ends on leaving the context.
    """

    def __init__(self, storage: Storage, name: str, candidate_id: str, *, ttl_s: float, clock: Clock) -> None:
        if not name or "/" in name:
            raise InvalidArgument.of_field("name", f"{name!r} must not be empty or contain '/'")
        check_ttl(ttl_s)
        check_key(f"{ELECTION_PREFIX}{name}/{'x' * 32}", field="name")
        self._storage = storage
        self._name = name
        self._prefix = f"{ELECTION_PREFIX}{name}/"
        self._candidate_id = candidate_id
        self._ttl_s = ttl_s
        self._clock = clock
        self._key = ""
        self._revision = ABSENT
        self._lease_id = ""
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    async def acquire(self) -> Leadership:
        """See ``Election.acquire``."""
        while True:
            if self._lost.is_set():
                await self._leave()
                await self._enter_when_possible()
            waiting = asyncio.create_task(self._wait_for_turn(), name=f"election-{self._name}-turn")
            losing = asyncio.create_task(self._lost.wait(), name=f"election-{self._name}-lost")
            try:
                await asyncio.wait({waiting, losing}, return_when=asyncio.FIRST_COMPLETED)
                if not self._lost.is_set():
                    waiting.result()
                    return Leadership(self._name, self._candidate_id, Compare(self._key, self._revision))
            finally:
                await _end(waiting)
                await _end(losing)

    async def lost(self) -> None:
        """See ``Election.lost``."""
        await self._lost.wait()

    async def _enter(self) -> None:
        """Queue up: a fresh lease, a key bound to it, and the task that keeps it alive."""
        sent = self._clock.monotonic()
        lease = await self._storage.grant_lease(self._ttl_s)
        try:
            key = f"{self._prefix}{lease.id}"
            outcome = await self._storage.commit(
                [Compare(key, ABSENT)], [Put(key, self._candidate_id.encode(), lease.id)]
            )
            if not isinstance(outcome, Committed):
                raise AssertionError(f"a fresh lease's election key exists: {key}")
        except BaseException:
            await self._revoke(lease.id)
            raise
        self._key, self._revision, self._lease_id = key, outcome.revision, lease.id
        self._lost = asyncio.Event()
        self._keeper = asyncio.create_task(
            self._keep(self._lost, lease.ttl_s, sent), name=f"election-{self._name}-keep-alive"
        )

    async def _enter_when_possible(self) -> None:
        while True:
            try:
                return await self._enter()
            except HypervisorError as exc:
                if exc.reason == "STORE_CLOSED":
                    raise
                log.warning("election_entry_failed", election=self._name, reason=exc.reason, error=str(exc))
                await self._clock.sleep(max(_RETRY_S, self._ttl_s / 10))

    async def _leave(self) -> None:
        """Stop keeping the lease and end it; the key goes with it."""
        if self._keeper is not None:
            await _end(self._keeper)
            self._keeper = None
        if self._lease_id:
            lease_id, self._lease_id = self._lease_id, ""
            await self._revoke(lease_id)
        self._lost.set()

    async def _revoke(self, lease_id: str) -> None:
        # Resigning early is a courtesy to the others: when it fails, the lease ends by itself.
        try:
            async with asyncio.timeout(_RESIGN_TIMEOUT_S):
                await self._storage.revoke_lease(lease_id)
        except (HypervisorError, TimeoutError) as exc:
            log.warning("election_resign_failed", election=self._name, lease_id=lease_id, error=str(exc))

    async def _wait_for_turn(self) -> None:
        """Return when no candidate is left before this one, or this one's own key is gone (lost)."""
        while True:
            try:
                revision, candidates = await self._candidates()
                if candidates.get(self._key) != self._revision:
                    self._lost.set()
                    return
                before = frozenset(k for k, created in candidates.items() if created < self._revision)
                if not before:
                    return
                await self._wait_for_deletion(before, after_revision=revision)
            except Compacted:
                continue
            except HypervisorError as exc:
                if exc.reason == "STORE_CLOSED":
                    raise
                await self._clock.sleep(max(_RETRY_S, exc.retry_after_s or 0.0))

    async def _candidates(self) -> tuple[int, dict[str, int]]:
        """The revision looked at, and each candidate's key with the revision of its creation."""
        start, revision = "", None
        candidates: dict[str, int] = {}
        while True:
            page = await self._storage.list(self._prefix, start_key=start, revision=revision)
            candidates.update((i.key, i.create_revision) for i in page.items)
            start, revision = page.next_key, page.revision
            if not start:
                return revision, candidates

    async def _wait_for_deletion(self, keys: frozenset[str], *, after_revision: int) -> None:
        """Return when one of the keys was deleted, or it is time to look anew: a watch that has lost that event must
        not leave the cluster without a leader."""
        watch = self._storage.watch(self._prefix, after_revision=after_revision, with_previous=False)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._ttl_s), aclosing(watch) as batches:
                async for batch in batches:
                    if any(change.item is None and change.key in keys for change in batch.changes):
                        return

    async def _keep(self, lost: asyncio.Event, ttl_s: float, sent: float) -> None:
        """Renew the lease until it has ended, its key is gone, or no renewal got through for a whole TTL.

        The TTL is counted from when the last successful renewal was *sent*: the store cannot have started it
        earlier.
        """
        deadline = sent + ttl_s
        pause = ttl_s / 3
        try:
            while True:
                await self._clock.sleep(min(pause, max(0.0, deadline - self._clock.monotonic())))
                sent = self._clock.monotonic()
                if sent >= deadline:
                    log.warning("leadership_lease_not_renewed", election=self._name, ttl_s=ttl_s)
                    return
                try:
                    async with asyncio.timeout(deadline - sent):
                        ttl_s = await self._storage.keep_alive(self._lease_id)
                    deadline = sent + ttl_s
                    pause = ttl_s / 3
                    async with asyncio.timeout(ttl_s):
                        item = await self._storage.get(self._key)
                    if item is None or item.mod_revision != self._revision:
                        log.warning("election_key_gone", election=self._name, key=self._key)
                        return
                except NotFound:
                    log.warning("election_lease_ended", election=self._name, lease_id=self._lease_id)
                    return
                except (HypervisorError, TimeoutError) as exc:
                    log.warning("election_keep_alive_failed", election=self._name, error=str(exc))
                    pause = min(_RETRY_S, ttl_s / 10)
        finally:
            lost.set()


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task of ours and wait until it is gone."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.warning("election_task_failed", task=task.get_name(), error=repr(exc))
