"""What an agent saw of an instance, folded into the instance's record. Pure.

The rules: older observations (by epoch, generation, sequence) never overwrite newer ones; moves the table of states
does not allow are not made; an operation in progress is not disturbed, but an end of the instance is always recorded;
an end nobody asked for is STOPPED only with exit code 0, else FAILED.
"""

from datetime import datetime

import structlog
from msgspec import structs

from hypervisor.core.model import SEQUENCE_BITS, Instance, Observation
from hypervisor.core.states import TRANSITIONAL, DesiredState, InstanceStatus, can_move

__all__ = ["fold", "lost", "missing", "settle"]

_ENDED = frozenset({InstanceStatus.STOPPED, InstanceStatus.FAILED})
_TOLD = frozenset({InstanceStatus.RUNNING, InstanceStatus.PAUSED}) | _ENDED

log = structlog.get_logger(__name__)


def fold(
    instance: Instance, seen: Observation, *, now: datetime, authoritative: bool = False
) -> Instance | None:
    """The record after an observation nobody waits for; None when it changes nothing.

    ``authoritative``: from the registration of a freshly started agent, whose word counts whatever its sequence.
    """
    if (seen.epoch, seen.generation) != (instance.epoch, instance.generation):
        return None
    if instance.status is InstanceStatus.MIGRATING:
        return None  # whoever moves it looks at both copies and settles what it is
    # A repeat of the last observation counts only where the record says that it does not know.
    repeated_is_news = authoritative or instance.status is InstanceStatus.UNKNOWN
    oldest = instance.observed_sequence + (0 if repeated_is_news else 1)
    # What the new agent answered before its registration came through is newer than that.
    same_start = seen.sequence >> SEQUENCE_BITS == instance.observed_sequence >> SEQUENCE_BITS
    if seen.sequence < oldest and (same_start or not authoritative):
        return None
    if seen.status not in _TOLD or instance.desired is DesiredState.DELETED:
        return None
    if instance.operation_id and seen.status not in _ENDED:
        return None
    merged = _merge(instance, seen, now=now)
    if merged is None and authoritative and seen.sequence < instance.observed_sequence:
        # An agent without its journal counts from the beginning: what it sees from now on is newer.
        return structs.replace(instance, observed_sequence=seen.sequence)
    return merged


def settle(instance: Instance, reply: Observation, *, now: datetime) -> Instance:
    """The record after the agent's answer to the operation that held it, which is over.

    An observation that overtook the answer (an instance that ended at once) stands.
    """
    if reply.sequence >= instance.observed_sequence:
        merged = _merge(instance, reply, now=now)
        if merged is not None:
            instance = merged
    if instance.status in TRANSITIONAL:
        instance = structs.replace(
            instance,
            status=InstanceStatus.FAILED,
            status_reason="UNSETTLED",
            status_message=f"its node answered that it is {reply.status.value}, which ends no operation",
        )
    return structs.replace(instance, operation_id="", transition_deadline=None, updated_at=now)


def missing(instance: Instance, *, now: datetime) -> Instance | None:
    """The record of an instance that its node's registration did not name; None when it needs no change.

    It may have been made while the registration was under way, so this only says that it is not known; the reconciler
    then asks the node.
    """
    if not _expected(instance) or instance.status is InstanceStatus.UNKNOWN:
        return None
    return structs.replace(
        instance,
        status=InstanceStatus.UNKNOWN,
        status_reason="NOT_REPORTED",
        status_message="its node came back and did not name it; the node is being asked",
        updated_at=now,
    )


def lost(instance: Instance, *, now: datetime) -> Instance | None:
    """The record of an instance its node does not have although it should; None when it needs no change."""
    if not _expected(instance):
        return None
    return structs.replace(
        instance,
        status=InstanceStatus.FAILED,
        status_reason="LOST",
        status_message="its node does not have it any more: delete it, or restore the node's data",
        finished_at=now,
        updated_at=now,
    )


def _expected(instance: Instance) -> bool:
    """Whether its node should have it now: nothing is under way with it, and its loss is not on record."""
    under_way = bool(instance.operation_id) or instance.desired is DesiredState.DELETED
    known_lost = instance.status is InstanceStatus.FAILED and instance.status_reason == "LOST"
    return not under_way and not known_lost and can_move(instance.status, InstanceStatus.FAILED)


def _merge(instance: Instance, seen: Observation, *, now: datetime) -> Instance | None:
    status, reason = _interpret(instance, seen)
    if not can_move(instance.status, status):
        log.warning(
            "observation_refused",
            instance_id=instance.id,
            status=instance.status.value,
            observed=seen.status.value,
            sequence=seen.sequence,
        )
        return None
    running = status in (InstanceStatus.RUNNING, InstanceStatus.PAUSED)
    merged = structs.replace(
        instance,
        status=status,
        status_reason=reason,
        status_message=seen.message,
        exit_code=None if running else _either(seen.exit_code, instance.exit_code),
        started_at=seen.started_at or instance.started_at,
        finished_at=None if running else seen.finished_at or instance.finished_at,
        runtime=seen.runtime or instance.runtime,
        runtime_reason=seen.runtime_reason if seen.runtime else instance.runtime_reason,
        restarts=seen.restarts or instance.restarts,
        lost=None,
    )
    if merged == instance:
        return None
    return structs.replace(merged, observed_sequence=seen.sequence, updated_at=now)


def _interpret(instance: Instance, seen: Observation) -> tuple[InstanceStatus, str]:
    """Status and reason that the observation means, given what was asked for."""
    if seen.status not in _ENDED:
        return seen.status, seen.reason
    asked_for = (
        instance.desired is DesiredState.STOPPED or instance.status is InstanceStatus.STOPPING
    ) and seen.reason != "OOM_KILLED"
    if seen.exit_code is None:
        if instance.status is InstanceStatus.FAILED and seen.status is InstanceStatus.STOPPED:
            # It never ran again since it failed: the cause stays.
            return instance.status, instance.status_reason
        return seen.status, seen.reason
    if asked_for or (seen.exit_code == 0 and seen.status is InstanceStatus.STOPPED):
        return InstanceStatus.STOPPED, seen.reason
    return InstanceStatus.FAILED, seen.reason or "EXITED"


def _either(first: int | None, second: int | None) -> int | None:
    return first if first is not None else second
