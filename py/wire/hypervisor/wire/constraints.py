"""Where an instance may be placed and wants to be, on the wire: conditions on labels, tolerations, affinity, spread."""

from collections.abc import Iterable

from hypervisor.core.model import (
    HOSTNAME_LABEL,
    ZONE_LABEL,
    AffinityTerm,
    LabelConstraint,
    PlacementRecord,
    ScorePart,
    SpreadTerm,
    Toleration,
)
from hypervisor.core.states import LabelOperator, TolerationOperator
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import LABEL_OPERATOR, TAINT_EFFECT, TOLERATION_OPERATOR
from hypervisor.wire.times import timestamp_of

__all__ = [
    "affinity_from_wire",
    "affinity_to_wire",
    "constraints_from_wire",
    "constraints_to_wire",
    "parts_to_wire",
    "record_to_wire",
    "spread_from_wire",
    "spread_to_wire",
    "toleration_from_wire",
    "toleration_to_wire",
]

_DEFAULT_WEIGHT = 100


def constraints_to_wire(constraints: Iterable[LabelConstraint]) -> list[instance_pb2.LabelConstraint]:
    """Conditions on labels."""
    return [
        instance_pb2.LabelConstraint(key=c.key, operator=LABEL_OPERATOR.to_wire(c.operator), values=c.values)
        for c in constraints
    ]


def constraints_from_wire(constraints: Iterable[instance_pb2.LabelConstraint]) -> tuple[LabelConstraint, ...]:
    """Conditions on labels; an operator that is not given is IN."""
    return tuple(
        LabelConstraint(
            key=c.key,
            operator=LABEL_OPERATOR.from_wire(c.operator) or LabelOperator.IN,
            values=tuple(c.values),
        )
        for c in constraints
    )


def toleration_to_wire(toleration: Toleration) -> instance_pb2.Toleration:
    """A toleration."""
    return instance_pb2.Toleration(
        key=toleration.key,
        operator=TOLERATION_OPERATOR.to_wire(toleration.operator),
        value=toleration.value,
        effect=TAINT_EFFECT.to_wire(toleration.effect),
    )


def toleration_from_wire(toleration: instance_pb2.Toleration) -> Toleration:
    """A toleration; an operator that is not given is EQUAL."""
    return Toleration(
        key=toleration.key,
        operator=TOLERATION_OPERATOR.from_wire(toleration.operator) or TolerationOperator.EQUAL,
        value=toleration.value,
        effect=TAINT_EFFECT.from_wire(toleration.effect),
    )


def affinity_to_wire(term: AffinityTerm) -> instance_pb2.AffinityTerm:
    """A term of affinity or anti-affinity."""
    return instance_pb2.AffinityTerm(
        selector=constraints_to_wire(term.selector),
        topology=term.topology,
        preferred=term.preferred,
        weight=term.weight if term.preferred else 0,
    )


def affinity_from_wire(term: instance_pb2.AffinityTerm) -> AffinityTerm:
    """A term of affinity or anti-affinity, defaults filled in."""
    return AffinityTerm(
        selector=constraints_from_wire(term.selector),
        topology=term.topology or HOSTNAME_LABEL,
        preferred=term.preferred,
        weight=term.weight or _DEFAULT_WEIGHT,
    )


def spread_to_wire(term: SpreadTerm) -> instance_pb2.SpreadTerm:
    """A term of spreading."""
    return instance_pb2.SpreadTerm(
        selector=constraints_to_wire(term.selector), topology=term.topology, weight=term.weight
    )


def spread_from_wire(term: instance_pb2.SpreadTerm) -> SpreadTerm:
    """A term of spreading, defaults filled in."""
    return SpreadTerm(
        selector=constraints_from_wire(term.selector),
        topology=term.topology or ZONE_LABEL,
        weight=term.weight or _DEFAULT_WEIGHT,
    )


def parts_to_wire(parts: Iterable[ScorePart]) -> list[instance_pb2.ScorePart]:
    """Parts of a score."""
    return [instance_pb2.ScorePart(name=p.name, value=p.value, weight=p.weight) for p in parts]


def record_to_wire(record: PlacementRecord) -> instance_pb2.PlacementRecord:
    """Why an instance was placed where it is."""
    return instance_pb2.PlacementRecord(
        placed_at=timestamp_of(record.placed_at),
        scheduler=record.scheduler,
        score=record.score,
        parts=parts_to_wire(record.parts),
    )
