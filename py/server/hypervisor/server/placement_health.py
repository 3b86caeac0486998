"""How placements on each node have gone lately: made from the operations in the records, so all servers see the same.

A create that fails through no fault of the request adds up to :data:`FAILURE` to its node's penalty, one that succeeds
halves it, and it halves by itself every half-life. So a node on which placements keep failing is ranked behind the
others, is tried again after a while, and is back where it was soon after it works again.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from hypervisor.core.clock import Clock
from hypervisor.core.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable, kind_of
from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.core.states import OperationState
from hypervisor.server.services import ClusterChange, Kind, NodePlacements, Versioned

__all__ = ["FAILURE", "PlacementHealth"]

FAILURE = 250
"""What one failure adds."""

_MOST = 1000
_NODES_FAULT = frozenset(
    {kind_of(e("")) for e in (DeadlineExceeded, Internal, ResourceExhausted, Unavailable)}
)
"""Kinds of errors that speak against the node. Others (a wrong image, a command that is not there) do not."""
_REFRESH_S = 1.0


@dataclass(slots=True)
class _Record:
    value: float
    at: datetime
    shown: int
    failures: int
    last_failure_at: datetime
    last_failure: str


class PlacementHealth:
    """See the module's docstring. ``changed(node_id)`` is called when a node's penalty becomes another number."""

    def __init__(
        self, clock: Clock, *, half_life_s: float, changed: Callable[[str], None] = lambda _: None
    ) -> None:
        self._clock = clock
        self._half_life_s = half_life_s
        self._changed = changed
        self._records: dict[str, _Record] = {}
        self._refresh_at = clock.monotonic()

    def listen(self, changed: Callable[[str], None]) -> None:
        """Replace whom to tell of changes."""
        self._changed = changed

    def penalty(self, node_id: str) -> int:
        """0..1000, as of the last :meth:`refresh` or change."""
        record = self._records.get(node_id)
        return 0 if record is None else record.shown

    def of(self, node_id: str) -> NodePlacements | None:
        """What there is to tell of a node; None where placements go well."""
        record = self._records.get(node_id)
        if record is None:
            return None
        return NodePlacements(
            penalty=self._decayed(record, self._clock.now()),
            failures=record.failures,
            last_failure_at=record.last_failure_at,
            last_failure=record.last_failure,
        )

    def refresh(self) -> None:
        """Let time have its effect; cheap, and not more often than once a second."""
        if not self._records or self._clock.monotonic() < self._refresh_at:
            return
        self._refresh_at = self._clock.monotonic() + _REFRESH_S
        now = self._clock.now()
        for node_id, record in list(self._records.items()):
            self._show(node_id, record, self._decayed(record, now))

    def learn(self, changes: Iterable[ClusterChange]) -> None:
        """Take in what the watch told: creates that have ended count, and nodes that are gone do not any more."""
        ended: list[OperationRecord] = []
        for change in changes:
            if change.kind is Kind.NODE and change.current is None:
                self._records.pop(change.object_id, None)
            elif change.kind is Kind.OPERATION and change.current is not None:
                operation = change.current.value
                assert isinstance(operation, OperationRecord)
                if (
                    operation.verb == "create"
                    and operation.node_id
                    and operation.done
                    and not _was_done(change.previous)
                ):
                    ended.append(operation)
        # At the start all that is remembered comes at once, in no order.
        for operation in sorted(ended, key=_finished_at):
            self._learn_end(operation)

    def _learn_end(self, operation: OperationRecord) -> None:
        at = _finished_at(operation)
        node_id = operation.node_id
        record = self._records.get(node_id)
        if operation.state is OperationState.SUCCEEDED:
            if record is not None:
                record.value, record.at, record.failures = self._value(record, at) / 2, at, 0
                self._show(node_id, record, self._decayed(record, self._clock.now()))
            return
        error = operation.error
        if operation.state is not OperationState.FAILED or error is None or error.kind not in _NODES_FAULT:
            return
        if record is None:
            record = self._records[node_id] = _Record(0.0, at, 0, 0, at, "")
        record.value, record.at = min(self._value(record, at) + FAILURE, _MOST), at
        record.failures += 1
        record.last_failure_at, record.last_failure = at, error.message
        self._show(node_id, record, self._decayed(record, self._clock.now()))

    def _value(self, record: _Record, at: datetime) -> float:
        passed_s = max((at - record.at).total_seconds(), 0.0)
        return record.value * math.exp2(-passed_s / self._half_life_s)

    def _decayed(self, record: _Record, now: datetime) -> int:
        return int(self._value(record, now))

    def _show(self, node_id: str, record: _Record, penalty: int) -> None:
        if penalty == 0:
            del self._records[node_id]
        if penalty != record.shown:
            record.shown = penalty
            self._changed(node_id)


def _was_done(previous: Versioned[Node] | Versioned[Instance] | Versioned[OperationRecord] | None) -> bool:
    return previous is not None and isinstance(previous.value, OperationRecord) and previous.value.done


def _finished_at(operation: OperationRecord) -> datetime:
    return operation.finished_at or operation.started_at
