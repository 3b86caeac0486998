"""How far back the store's history is kept: what the leader tells the store to forget. Pure."""

from collections import deque

__all__ = ["HistoryKeeper"]


class HistoryKeeper:
    """Remembers which revision the store had when, so that history can be kept for a time.

    SQLite forgets by itself (``store.history_age``); etcd keeps everything until it is told.
    """

    def __init__(self, *, keep_s: float, interval_s: float) -> None:
        self._keep_s = keep_s
        self._interval_s = interval_s
        self._samples: deque[tuple[float, int]] = deque()

    def forget_up_to(self, now: float, revision: int) -> int | None:
        """Note the present revision; the revision before which history may go now, or None.

        ``now`` in seconds of a monotonic clock. Call it as often as you like: it samples every ``interval_s``.
        """
        if self._samples and now - self._samples[-1][0] < self._interval_s:
            return None
        self._samples.append((now, revision))
        oldest = None
        while now - self._samples[0][0] > self._keep_s:
            oldest = self._samples.popleft()[1]
        return oldest
