"""What is to be done so that one node has what the records want of it. Pure: values in, actions out.

The node was asked for everything it has; ``wanted`` are the records of the node from before it was asked, ``others``
those of other instances it named, from after. So an instance that was made, moved or deleted meanwhile is taken neither
for missing nor for an orphan. The commits that carry actions out look again, and a second look finds what is left.

What an operation holds is left to the operation, and what ended by itself to its node's restart policy; both are found
here only where nobody is at it any more.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from hypervisor.core.model import Instance, Observation
from hypervisor.core.restarts import RestartPolicy
from hypervisor.core.states import ACTIVE, DesiredState, InstanceStatus, InstanceType
from hypervisor.server.observations import fold

__all__ = [
    "Adopt",
    "CreateAgain",
    "DeleteCopy",
    "GiveSizes",
    "KeepOrphan",
    "MarkLost",
    "NodeAction",
    "NodeSituation",
    "Start",
    "Stop",
    "TakeIn",
    "reconcile",
]

_ENDED = frozenset({InstanceStatus.STOPPED, InstanceStatus.FAILED})
_RESTED_ON_PURPOSE = frozenset({"SUSPENDED", "RESTORED"})


@dataclass(frozen=True, slots=True)
class TakeIn:
    """The record does not say what the node shows."""

    seen: Observation


@dataclass(frozen=True, slots=True)
class MarkLost:
    """The node does not have it, and it is not to be made again."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class CreateAgain:
    """The node does not have it, or an outdated copy: make it anew there, as a new placement (epoch)."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Its agent found it at its runtime and knows nothing else of it: tell it what it is."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Start:
    """It shall run, has ended, and its node does nothing about it."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """It runs and shall not."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class GiveSizes:
    """Nobody knows whether a change of its size came to be: make it what its specification says."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class DeleteCopy:
    """The node shall not have it: remove exactly this copy."""

    seen: Observation
    why: str
    unknown: bool = False
    """No record tells of it: to be looked for once more before."""


@dataclass(frozen=True, slots=True)
class KeepOrphan:
    """The node shall not have it, as far as is known, and that may be wrong: leave it, and tell."""

    seen: Observation
    why: str


NodeAction = TakeIn | MarkLost | CreateAgain | Adopt | Start | Stop | GiveSizes | DeleteCopy | KeepOrphan


@dataclass(frozen=True, slots=True)
class NodeSituation:
    """One node at one moment. Times of orphans in seconds of a monotonic clock.

    ``working``: types of instances whose driver works there. ``deleted``: ids whose deletion, or failed creation, is on
    record. ``orphans``: since when copies are known of which there is no record. ``records_since``: since when the
    store has every record there is, as it was begun or restored then; None: whatever is not on record is not wanted.
    """

    node_id: str
    now: datetime
    working: Collection[InstanceType]
    wanted: Mapping[str, Instance]
    observed: Mapping[str, Observation]
    others: Mapping[str, Instance]
    deleted: Collection[str]
    orphans: Mapping[str, float]
    monotonic_s: float
    orphan_grace_s: float
    records_since: datetime | None = None


def reconcile(situation: NodeSituation) -> tuple[NodeAction, ...]:
    """Everything that is to be done on the node now."""
    return (*_of_records(situation), *_of_others(situation))


def _of_records(situation: NodeSituation) -> Iterator[NodeAction]:
    for instance in situation.wanted.values():
        if instance.operation_id or instance.desired is DesiredState.DELETED:
            continue
        seen = situation.observed.get(instance.id)
        if seen is None:
            yield from _missing(instance, situation)
        elif _newer(instance, seen):
            yield TakeIn(seen)  # The store went back: the record follows (adopting.py).
        elif seen.epoch > instance.epoch or seen.generation > instance.generation:
            yield KeepOrphan(seen, "it is newer than its record says")
        elif (seen.epoch, seen.generation) != (instance.epoch, instance.generation):
            # Whatever was made of its successor is not there (any more).
            yield DeleteCopy(seen, "its record is of a newer placement or specification")
        else:
            yield from _present(instance, seen, situation)


def _missing(instance: Instance, situation: NodeSituation) -> Iterator[NodeAction]:
    if instance.type not in situation.working:
        return  # It may well be there: whoever could tell does not answer.
    if _is_lost(instance) or instance.move is not None:
        return  # What is left of a move is settled first.
    if _made_again(instance):
        yield CreateAgain(instance.id, instance.epoch)
    else:
        yield MarkLost(instance.id, instance.epoch)


def _present(instance: Instance, seen: Observation, situation: NodeSituation) -> Iterator[NodeAction]:
    if fold(instance, seen, now=situation.now) is not None:
        yield TakeIn(seen)
    if instance.desired is DesiredState.STOPPED and seen.status in ACTIVE:
        yield Stop(instance.id, instance.epoch)
    elif seen.reason == "RUNTIME_LOST":
        if _made_again(instance) and instance.type in situation.working:
            yield CreateAgain(instance.id, instance.epoch)
    elif _policy(instance) is not None and seen.restarts is None:
        yield Adopt(instance.id, instance.epoch)
    elif _forgotten_by_its_node(instance, seen):
        yield Start(instance.id, instance.epoch)
    elif instance.resizing is not None and seen.status in ACTIVE | _ENDED:
        yield GiveSizes(instance.id, instance.epoch)


def _of_others(situation: NodeSituation) -> Iterator[NodeAction]:
    for instance_id, seen in situation.observed.items():
        if instance_id in situation.wanted:
            continue
        record = situation.others.get(instance_id)
        if record is None:
            yield _unknown(seen, situation)
        elif record.node_id == situation.node_id or record.operation_id or record.move is not None:
            continue  # It was made or moved here since the records were looked at, or is on its way.
        elif _newer(record, seen):
            yield TakeIn(seen)
        elif record.epoch != seen.epoch:
            yield DeleteCopy(seen, f"it is on node {record.node_id}, of another placement")
        else:
            yield KeepOrphan(seen, f"its record says that this very placement is on node {record.node_id}")


def _unknown(seen: Observation, situation: NodeSituation) -> NodeAction:
    if seen.instance_id in situation.deleted:
        return DeleteCopy(seen, "it was deleted, or its creation failed", unknown=True)
    if situation.records_since is not None and not _began_after(seen, situation.records_since):
        return KeepOrphan(
            seen, "there is no record of it, and it is older than the store or its last restore"
        )
    since = situation.orphans.get(seen.instance_id)
    if since is None or situation.monotonic_s - since < situation.orphan_grace_s:
        return KeepOrphan(seen, "there is no record of it")
    return DeleteCopy(seen, "there has been no record of it for reconcile.orphan_grace", unknown=True)


def _began_after(seen: Observation, time: datetime) -> bool:
    return seen.started_at is not None and seen.started_at > time


def _newer(instance: Instance, seen: Observation) -> bool:
    """Whether it is a placement that the record never heard of, which no move is about."""
    return seen.epoch >= instance.next_epoch and instance.move is None


def _policy(instance: Instance) -> RestartPolicy | None:
    policy = instance.spec.restart
    return policy if policy is not None and policy.active else None


def _made_again(instance: Instance) -> bool:
    """Whether it is to be made anew where it is lost: its user wants it to run whatever happens."""
    return instance.desired is DesiredState.RUNNING and _policy(instance) is not None


def _is_lost(instance: Instance) -> bool:
    return instance.status is InstanceStatus.FAILED and instance.status_reason == "LOST"


def _forgotten_by_its_node(instance: Instance, seen: Observation) -> bool:
    """Whether its policy is about the end that is seen, and its node neither waits nor has given up."""
    policy = _policy(instance)
    if policy is None or instance.desired is not DesiredState.RUNNING or seen.status not in _ENDED:
        return False
    if seen.restarts is None or seen.restarts.pending or seen.reason in _RESTED_ON_PURPOSE:
        return False
    return policy.covers(failed=seen.status is InstanceStatus.FAILED or seen.exit_code not in (None, 0))
