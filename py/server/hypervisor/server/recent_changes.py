"""The view's newest batches of changes, bounded, in order, so that most watchers are served from memory.

Positions are sequence numbers of batches, not revisions: a repair (see ``view.py``) may share the revision of the
batch before it, and a follower that stands behind it still gets it.
"""

import asyncio
from dataclasses import dataclass

from hypervisor.server.services import ClusterChange

__all__ = ["Recent", "RecentChanges"]


@dataclass(frozen=True, slots=True)
class Recent:
    """One batch."""

    revision: int
    changes: tuple[ClusterChange, ...]


class RecentChanges:
    """A window of batches. ``floor`` is the revision from which on (exclusive) it is complete."""

    def __init__(self, *, keep_changes: int) -> None:
        self._keep = keep_changes
        self._batches: dict[int, Recent] = {}
        self._first = 0
        self._next = 0
        self._held = 0
        self._floor = 0
        self._advanced = asyncio.Event()

    @property
    def floor(self) -> int:
        """Everything after this revision is here."""
        return self._floor

    @property
    def end(self) -> int:
        """Position after the newest batch."""
        return self._next

    def reset(self, revision: int) -> None:
        """Forget all: what came before ``revision`` is not to be had from here. Followers find their position gone."""
        self._batches.clear()
        self._first = self._next = self._next + 1
        self._held = 0
        self._floor = revision

    def append(self, revision: int, changes: tuple[ClusterChange, ...]) -> None:
        """Add the batch and wake the followers."""
        if changes:
            self._batches[self._next] = Recent(revision, changes)
            self._next += 1
            self._held += len(changes)
            while self._held > self._keep and self._first < self._next - 1:
                gone = self._batches.pop(self._first)
                self._first += 1
                self._held -= len(gone.changes)
                self._floor = gone.revision
        self.wake()

    def wake(self) -> None:
        """Have the followers look again (the revision moved)."""
        self._advanced.set()
        self._advanced = asyncio.Event()

    def position_after(self, revision: int) -> int | None:
        """Position of the first batch newer than ``revision``; None where batches between are gone."""
        if revision < self._floor:
            return None
        position = self._next
        while position > self._first and self._batches[position - 1].revision > revision:
            position -= 1
        return position

    def at(self, position: int) -> Recent | None:
        """The batch; None when it is gone or (at ``end``) not there yet."""
        return self._batches.get(position)

    def holds(self, position: int) -> bool:
        """Whether following can go on from ``position``."""
        return self._first <= position <= self._next

    async def wait(self) -> None:
        """Return at the next append or wake."""
        await self._advanced.wait()
