"""The newest observation of each instance, numbered: an older one never overwrites a newer one at the server.

Pure bookkeeping on the event loop. Sequences rise over restarts of the agent too: the upper bits count its starts.
"""

from datetime import datetime

import msgspec

from hypervisor.core.model import SEQUENCE_BITS, Observation

__all__ = ["ObservationBook"]


class ObservationBook:
    """``starts``: how often the agent has started, this time included."""

    def __init__(self, *, starts: int) -> None:
        self._sequence = starts << SEQUENCE_BITS
        self._newest: dict[str, Observation] = {}
        self._events: dict[str, int] = {}

    def record(self, seen: Observation) -> tuple[Observation, bool]:
        """Number what was seen and keep it; the kept observation, and whether it says anything new."""
        known = self._newest.get(seen.instance_id)
        if known is not None and _same(known, seen):
            return known, False
        self._sequence += 1
        numbered = msgspec.structs.replace(seen, sequence=self._sequence)
        self._newest[seen.instance_id] = numbered
        return numbered, True

    def event(self, seen: Observation) -> tuple[Observation, bool]:
        """As :meth:`record`, for what a driver tells unasked."""
        self._events[seen.instance_id] = self._events.get(seen.instance_id, 0) + 1
        return self.record(seen)

    def renumber(self, now: datetime) -> None:
        """Everything is still as it was seen last: the same observations, made again at ``now``."""
        for instance_id, seen in self._newest.items():
            self._sequence += 1
            self._newest[instance_id] = msgspec.structs.replace(
                seen, sequence=self._sequence, observed_at=now
            )

    def events_of(self, instance_id: str) -> int:
        """How many events there were of it. A question asked of the driver before an event may be answered from
        before it: when the count changed meanwhile, ask again."""
        return self._events.get(instance_id, 0)

    def newest(self, instance_id: str) -> Observation | None:
        """What was last seen of it."""
        return self._newest.get(instance_id)

    def forget(self, instance_id: str) -> None:
        """It is gone."""
        self._newest.pop(instance_id, None)
        self._events.pop(instance_id, None)


def _same(known: Observation, seen: Observation) -> bool:
    return known == msgspec.structs.replace(seen, sequence=known.sequence, observed_at=known.observed_at)
