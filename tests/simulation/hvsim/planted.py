"""Bugs that are put into the product on purpose, to show that the simulator finds such bugs.

Some are the ones it has found: those are mended, and are put back here.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from hypervisor.agent.drivers import instances as agent_instances
from hypervisor.core import ids
from hypervisor.core.errors import HypervisorError
from hypervisor.server import executor, node_changes, observations, operations, outcomes, placement
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Batch, Draft
from hypervisor.server.store.election import Candidacy
from hypervisor.server.store.storage import Committed
from hypervisor.server.view import StoreView

__all__ = ["PLANTED", "planted"]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _skip_compares() -> AbstractContextManager[None]:
    """Transactions compare nothing: the last writer wins."""
    return _replaced(Batch, "compares", lambda self: [])


@contextmanager
def _answer_before_commit() -> Iterator[None]:
    """Callers are answered before their transaction is in the store, whatever becomes of it."""

    async def commit_next(self: Any, lane: Any) -> None:
        self.known.forget_seen()
        batch = Batch(self.known, now=self._clock.now())
        entries = self._fill(batch, self._queues[lane])
        self._resolve(entries, self.known.revision)
        if batch.empty:
            return
        try:
            outcome = await self._storage.commit(batch.compares(), batch.operations())
        except HypervisorError:
            return
        if isinstance(outcome, Committed):
            self.known.learn_commit(outcome.revision, tuple(batch.updates(outcome.revision)))
        else:
            self.known.learn_items(outcome.revision, outcome.current)

    with _replaced(GroupCommitter, "_commit_next", commit_next):
        yield


@contextmanager
def _keep_reservation() -> Iterator[None]:
    """Removing an instance does not give its capacity back."""
    real = placement.release

    def release(draft: Draft, instance: Any) -> None:
        real(draft, instance)
        for path in [path for path in draft.writes if "/allocations/" in path]:
            del draft.writes[path]

    with ExitStack() as stack:
        for module in (outcomes, executor):
            stack.enter_context(_replaced(module, "release", release))
        yield


def _request_id_ignored() -> AbstractContextManager[None]:
    """A repeated request is a new one."""
    numbers = itertools.count()
    real = ids.derived_id
    return _replaced(
        operations, "derived_id", lambda prefix, *parts: real(prefix, *parts, str(next(numbers)))
    )


def _late_create_accepted() -> AbstractContextManager[None]:
    """An agent makes what it has been told to delete, when a delayed create says so."""
    return _replaced(agent_instances.LocalInstances, "refuse_deleted", lambda self, slot, ref: None)


def _refusals_unchecked() -> AbstractContextManager[None]:
    """Users are refused for what a server that is behind believes."""
    return _replaced(Batch, "admit_refusal", lambda self, draft: True)


def _election_trusts_watch() -> AbstractContextManager[None]:
    """A candidate waits for an event of the watch, and for nothing else."""
    real = Candidacy._wait_for_deletion

    async def wait(self: Any, keys: frozenset[str], *, after_revision: int) -> None:
        kept, self._ttl_s = self._ttl_s, 1e9
        try:
            await real(self, keys, after_revision=after_revision)
        finally:
            self._ttl_s = kept

    return _replaced(Candidacy, "_wait_for_deletion", wait)


def _view_trusts_watch() -> AbstractContextManager[None]:
    """A server's view of the cluster is never compared with the store."""

    async def compare(self: Any, *, repair_lag: bool) -> bool:
        await asyncio.sleep(0)
        return True

    return _replaced(StoreView, "_compare", compare)


def _create_forgotten() -> AbstractContextManager[None]:
    """A create whose last attempt did nothing is taken for one that did nothing, whatever the attempts before did."""
    real = executor.OperationExecutor._end_failed

    async def end_failed(
        self: Any, operation: Any, instance: Any, error: HypervisorError, driven: Any
    ) -> None:
        driven.untried = error.reason in outcomes._NOTHING_BEGUN
        await real(self, operation, instance, error, driven)

    return _replaced(executor.OperationExecutor, "_end_failed", end_failed)


def _stale_observations() -> AbstractContextManager[None]:
    """What an agent saw earlier overwrites what it saw later."""
    real = observations.fold

    def fold(instance: Any, seen: Any, **how: Any) -> Any:
        return real(instance, seen, **{**how, "authoritative": True})

    return _both(_replaced(observations, "SEQUENCE_BITS", 0), _replaced(node_changes, "fold", fold))


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


PLANTED: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "skip-compares": _skip_compares,
    "answer-before-commit": _answer_before_commit,
    "keep-reservation": _keep_reservation,
    "request-id-ignored": _request_id_ignored,
    "late-create-accepted": _late_create_accepted,
    "refusals-unchecked": _refusals_unchecked,
    "election-trusts-watch": _election_trusts_watch,
    "view-trusts-watch": _view_trusts_watch,
    "create-forgotten": _create_forgotten,
    "stale-observations": _stale_observations,
}
"""By name; each is a context inside which the product has the bug."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Inside, the product has this bug; none for an empty name."""
    if not name:
        yield
        return
    with PLANTED[name]():
        yield
