"""What tests of a Storage share: unique keys, waiting for conditions, reading watches."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from hypervisor.server.store.storage import (
    Change,
    Committed,
    Compare,
    Conflicted,
    Operation,
    Storage,
    WatchBatch,
)

__all__ = ["apply", "changes_of", "conflicted", "count_is", "eventually", "read_watch", "unique_root"]


def unique_root() -> str:
    """A prefix that no other test uses: backends may be shared between tests."""
    return f"/test/{uuid.uuid4().hex}/"


async def eventually(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 10.0) -> None:
    """Return when ``condition`` holds; fail after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 (a store's state sends no event)
            await asyncio.sleep(0.02)


async def apply(storage: Storage, *operations: Operation, compares: tuple[Compare, ...] = ()) -> int:
    """Commit what must not conflict; returns the revision."""
    outcome = await storage.commit(compares, operations)
    assert isinstance(outcome, Committed), outcome
    return outcome.revision


async def read_watch(
    storage: Storage,
    prefix: str,
    *,
    after_revision: int,
    until: Callable[[list[WatchBatch]], bool],
    timeout_s: float = 20.0,
) -> list[WatchBatch]:
    """Batches with changes (no progress marks), in the order they came, until ``until`` holds for them."""
    batches: list[WatchBatch] = []
    async with asyncio.timeout(timeout_s):
        async with aclosing(storage.watch(prefix, after_revision=after_revision)) as watch:
            async for batch in watch:
                if batch.changes:
                    batches.append(batch)
                if until(batches):
                    break
    return batches


def count_is(count: int) -> Callable[[list[WatchBatch]], bool]:
    """For ``read_watch``: until there are so many batches."""
    return lambda batches: len(batches) == count


def changes_of(batches: list[WatchBatch]) -> list[Change]:
    """All changes, flat."""
    return [change for batch in batches for change in batch.changes]


def conflicted(outcome: Committed | Conflicted) -> Conflicted:
    """The outcome of a commit that had to conflict."""
    assert isinstance(outcome, Conflicted), outcome
    return outcome
