"""When leases end, for the backends that keep time themselves (SQLite and memory); etcd keeps its own.

Deadlines live in memory on the monotonic clock: after a restart every lease starts a whole TTL anew, so what
is stored is the TTL only, and renewing a lease writes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hypervisor.server.store.validation import lease_not_found

__all__ = ["LeaseTimers"]


@dataclass(slots=True)
class _Timer:
    ttl_s: float
    deadline: float
    ending: bool = False


class LeaseTimers:
    """Deadlines of leases. Pure: the caller says what time it is and deletes what is due."""

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}

    def __len__(self) -> int:
        return len(self._timers)

    def add(self, lease_id: str, ttl_s: float, *, now: float) -> None:
        """Start a lease; it ends at ``now + ttl_s``."""
        self._timers[lease_id] = _Timer(ttl_s, now + ttl_s)

    def renew(self, lease_id: str, *, now: float) -> float:
        """Move the deadline to a whole TTL from ``now``; returns the TTL.

        Raises ``NotFound`` when the lease is unknown, overdue or already being ended: a lease that was
        reported as ended never comes back to life.
        """
        timer = self._timers.get(lease_id)
        if timer is None or timer.ending or timer.deadline <= now:
            raise lease_not_found(lease_id)
        timer.deadline = now + timer.ttl_s
        return timer.ttl_s

    def take_due(self, now: float) -> tuple[str, ...]:
        """Leases whose time is up, marked as being ended; ``retry`` puts them back when that failed."""
        due = tuple(key for key, t in self._timers.items() if not t.ending and t.deadline <= now)
        for lease_id in due:
            self._timers[lease_id].ending = True
        return due

    def retry(self, lease_ids: Iterable[str], *, at: float) -> None:
        """Have ``take_due`` return these again from ``at`` on; they cannot be renewed meanwhile."""
        for lease_id in lease_ids:
            timer = self._timers.get(lease_id)
            if timer is not None:
                timer.ending, timer.deadline = False, min(at, timer.deadline)

    def remove(self, lease_id: str) -> None:
        """Forget a lease that has ended."""
        self._timers.pop(lease_id, None)

    def next_deadline(self) -> float | None:
        """When the next lease is due; None while there is none."""
        return min((t.deadline for t in self._timers.values() if not t.ending), default=None)
