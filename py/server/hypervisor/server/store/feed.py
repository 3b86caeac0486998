"""The recent changes of a backend in this process, and the watch that SQLite and memory build on it.

A watch here is a position in the sequence of revisions, not a queue: it reads what is newer than its
position from this feed, or from the backend's history where the feed no longer reaches. A slow consumer
therefore costs nothing and can never be given a gap.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from hypervisor.server.store.storage import Compacted, WatchBatch
from hypervisor.server.store.validation import store_closed

__all__ = ["ChangeFeed", "HistoryChunk", "HistoryReader", "compacted", "follow"]

_CHUNK_REVISIONS = 256
_PROGRESS_REVISIONS = 256
"""A watch that had nothing to deliver for so many revisions yields a progress mark, so that its consumer's
resume point does not fall behind compaction."""


@dataclass(frozen=True, slots=True)
class HistoryChunk:
    """Batches of one prefix read from history; everything up to ``reached`` is in them."""

    batches: tuple[WatchBatch, ...]
    reached: int


HistoryReader = Callable[[str, int], Awaitable[HistoryChunk]]
"""``(prefix, after_revision)`` -> the next chunk; raises ``Compacted`` where the history is gone."""


def compacted(asked: int, *, oldest: int, newest: int) -> Compacted:
    """The error for a position outside ``oldest``..``newest``."""
    return Compacted(
        f"revision {asked} is not in the store's history (it reaches from {oldest} to {newest}): list again",
        metadata={"revision": str(asked), "oldest": str(oldest), "newest": str(newest)},
    )


class ChangeFeed:
    """A window of the newest revisions, whole, in order and without gaps.

    Belongs to the event loop. ``keep_bytes`` and ``keep_revisions`` bound the window; what falls out is read
    from history.
    """

    def __init__(self, revision: int, *, keep_revisions: int, keep_bytes: int) -> None:
        self._newest = revision
        self._first = revision + 1
        self._window: dict[int, tuple[WatchBatch, int]] = {}
        self._bytes = 0
        self._keep_revisions = keep_revisions
        self._keep_bytes = keep_bytes
        self._advanced = asyncio.Event()
        self._closed = False

    @property
    def newest(self) -> int:
        """The newest revision published."""
        return self._newest

    def publish(self, batches: Sequence[WatchBatch]) -> None:
        """Append the batches of the revisions after ``newest``, and wake the watches."""
        for batch in batches:
            if batch.revision != self._newest + 1:
                raise AssertionError(f"revision {batch.revision} published after {self._newest}")
            self._newest = batch.revision
            size = sum(len(c.item.value) if c.item else 0 for c in batch.changes) + 200 * len(batch.changes)
            self._window[batch.revision] = (batch, size)
            self._bytes += size
        while self._window and (len(self._window) > self._keep_revisions or self._bytes > self._keep_bytes):
            self.trim(self._first)
        self._wake()

    def trim(self, revision: int) -> None:
        """Drop everything up to and including ``revision`` from the window."""
        while self._first <= min(revision, self._newest):
            self._bytes -= self._window.pop(self._first)[1]
            self._first += 1

    def after(self, revision: int) -> Sequence[WatchBatch] | None:
        """Batches directly after ``revision`` (empty: none yet); None where the window begins later."""
        if revision + 1 < self._first:
            return None
        stop = min(self._newest, revision + _CHUNK_REVISIONS)
        return [self._window[r][0] for r in range(revision + 1, stop + 1)]

    async def wait_beyond(self, revision: int) -> None:
        """Return when something newer than ``revision`` is there; raise ``STORE_CLOSED`` after ``close``."""
        while True:
            self.check_open()
            if self._newest > revision:
                return
            await self._advanced.wait()

    def check_open(self) -> None:
        """Raise ``Unavailable`` (``STORE_CLOSED``) after ``close``."""
        if self._closed:
            raise store_closed()

    def close(self) -> None:
        """End all watches."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._advanced.set()
        self._advanced = asyncio.Event()


async def follow(
    feed: ChangeFeed, prefix: str, *, after_revision: int, history: HistoryReader
) -> AsyncGenerator[WatchBatch, None]:
    """Yield the changes of ``prefix`` after ``after_revision`` for ever, from the feed or from history."""
    position = told = after_revision
    while True:
        feed.check_open()
        recent = feed.after(position)
        if recent is None:
            chunk = await history(prefix, position)
            for batch in chunk.batches:
                yield batch
                told = batch.revision
            position = chunk.reached
        else:
            for batch in recent:
                changes = tuple(c for c in batch.changes if c.key.startswith(prefix))
                if changes:
                    yield WatchBatch(batch.revision, changes)
                    told = batch.revision
                position = batch.revision
        if position - told >= _PROGRESS_REVISIONS:
            yield WatchBatch(position, ())
            told = position
        await feed.wait_beyond(position)
