"""What an instance's restart policy makes of what is seen of it. Pure; :mod:`.restarting` acts on it."""

import random
from datetime import datetime

import msgspec

from hypervisor.agent.entries import Entry, Phase
from hypervisor.core.model import Observation
from hypervisor.core.restarts import BACKOFF, EXHAUSTED, RestartPolicy, Restarts
from hypervisor.core.states import InstanceStatus

__all__ = ["judge"]

_ENDED = frozenset({InstanceStatus.STOPPED, InstanceStatus.FAILED})
_NO_END = frozenset({"RUNTIME_LOST", "SUSPENDED", "RESTORED"})
"""Reasons of one that did not end by itself, or of which nothing is left that could be started."""


def judge(entry: Entry, seen: Observation, *, now: datetime, rng: random.Random) -> tuple[Entry, Observation]:
    """The entry with what is decided, and the observation as it is told: with the count, and for one that has ended
    with what comes next."""
    policy = entry.restart
    if policy is None:
        return entry, seen
    state = entry.restarts
    if entry.phase is Phase.READY:
        if seen.status not in _ENDED or seen.reason in _NO_END:
            if state.pending and seen.status is not InstanceStatus.CREATING:
                state = msgspec.structs.replace(state, next_at=None, exhausted=False)
        elif entry.runs:
            seen = _as_driver_told(seen, state)
            if not state.pending and policy.covers(failed=_failed(seen)):
                state = state.ended(
                    policy,
                    reason=seen.reason,
                    exit_code=seen.exit_code,
                    ran=(seen.started_at, seen.finished_at),
                    now=now,
                    jitter=rng.random(),
                )
            seen = _told(seen, policy, state)
    if state != entry.restarts:
        entry = msgspec.structs.replace(entry, restarts=state)
    return entry, msgspec.structs.replace(seen, restarts=state)


def _failed(seen: Observation) -> bool:
    return seen.status is InstanceStatus.FAILED or seen.exit_code not in (None, 0)


def _as_driver_told(seen: Observation, state: Restarts) -> Observation:
    """Undo :func:`_told`: where a driver cannot be asked, what was told before is recorded again."""
    if seen.reason not in (BACKOFF, EXHAUSTED):
        return seen
    return msgspec.structs.replace(
        seen, reason=state.last_reason, message=seen.message.rpartition("; ")[0] or seen.message
    )


def _told(seen: Observation, policy: RestartPolicy, state: Restarts) -> Observation:
    of = "" if policy.max_restarts is None else f" of {policy.max_restarts}"
    what = seen.message or "it ended"
    if state.next_at is not None:
        return msgspec.structs.replace(
            seen,
            reason=BACKOFF,
            message=f"{what}; restart {state.count + 1}{of} is due at {state.next_at:%H:%M:%S} UTC",
        )
    if state.exhausted:
        return msgspec.structs.replace(
            seen,
            status=InstanceStatus.FAILED,
            reason=EXHAUSTED,
            message=f"{what}; it was started again {state.count} times in a row, which is all its policy allows: "
            "mend the cause and start it",
        )
    return seen
