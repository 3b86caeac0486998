"""Checks of what a spec says of its place: selectors, tolerations, affinity, spread; and of taints of nodes. Pure."""

from collections.abc import Sequence

from hypervisor.core.model import Taint
from hypervisor.core.names import MAX_TAINTS, check_labels
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import instance_pb2, node_pb2
from hypervisor.wire.enums import LABEL_OPERATOR, TAINT_EFFECT, TOLERATION_OPERATOR
from hypervisor.wire.nodes import taint_from_wire

__all__ = ["check_constraints", "check_label_key", "check_placement", "check_taint", "taints_of"]

_MAX_CONSTRAINTS = 32
_MAX_CONSTRAINT_VALUES = 64
_MAX_TERM_CONSTRAINTS = 8
_MAX_TOLERATIONS = 16
_MAX_AFFINITY = 8
_MAX_SPREAD = 4
_MAX_WEIGHT = 100


def check_placement(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    """Everything of a spec that says where the instance may be and wants to be."""
    check_constraints(wrong, f"{at}node_selector", spec.node_selector, most=_MAX_CONSTRAINTS, whose="nodes")
    _check_count(wrong, f"{at}tolerations", len(spec.tolerations), _MAX_TOLERATIONS)
    for index, toleration in enumerate(spec.tolerations[:_MAX_TOLERATIONS]):
        _check_toleration(wrong, f"{at}tolerations[{index}]", toleration)
    for name, terms in (("affinity", spec.affinity), ("anti_affinity", spec.anti_affinity)):
        _check_count(wrong, f"{at}{name}", len(terms), _MAX_AFFINITY)
        for index, term in enumerate(terms[:_MAX_AFFINITY]):
            field = f"{at}{name}[{index}]"
            _check_term(wrong, field, term)
            if term.weight and not term.preferred:
                wrong.add(f"{field}.weight", "is for preferred terms only: remove it, or set preferred")
    _check_count(wrong, f"{at}spread", len(spec.spread), _MAX_SPREAD)
    for index, spread in enumerate(spec.spread[:_MAX_SPREAD]):
        _check_term(wrong, f"{at}spread[{index}]", spread)


def check_label_key(wrong: Violations, field: str, key: str, *, what: str) -> None:
    """A key of a label or a taint."""
    if not key:
        wrong.add(field, f"is required: give {what}")
    else:
        wrong.extend(*check_labels(field, {key: ""}))


def check_taint(wrong: Violations, field: str, taint: node_pb2.Taint) -> None:
    """One taint, as somebody gives it."""
    check_label_key(wrong, f"{field}.key", taint.key, what="the key of the taint")
    if taint.value:
        wrong.label_value(f"{field}.value", taint.value)
    if TAINT_EFFECT.from_wire(taint.effect) is None:
        wrong.add(f"{field}.effect", "is required: give NO_SCHEDULE or PREFER_NO_SCHEDULE")
    if taint.configured:
        wrong.add(f"{field}.configured", "is set by the server: leave it empty")


def taints_of(wrong: Violations, field: str, taints: Sequence[node_pb2.Taint]) -> tuple[Taint, ...]:
    """The taints that an agent gives its node; none where one is wrong."""
    inner = Violations()
    _check_count(inner, field, len(taints), MAX_TAINTS)
    for index, taint in enumerate(taints[:MAX_TAINTS]):
        check_taint(inner, f"{field}[{index}]", taint)
    pairs = [(taint.key, taint.effect) for taint in taints]
    if len(set(pairs)) < len(pairs):
        inner.add(field, "has two taints of one key and effect: leave one out")
    wrong.merge(inner)
    return () if inner.found else tuple(taint_from_wire(taint, field) for taint in taints)


def _check_count(wrong: Violations, field: str, count: int, most: int) -> None:
    if count > most:
        wrong.add(field, f"has {count} entries: use at most {most}")


def _check_term(
    wrong: Violations, field: str, term: instance_pb2.AffinityTerm | instance_pb2.SpreadTerm
) -> None:
    if not term.selector:
        wrong.add(f"{field}.selector", "is required: say by their labels which instances are meant")
    check_constraints(
        wrong, f"{field}.selector", term.selector, most=_MAX_TERM_CONSTRAINTS, whose="instances"
    )
    if term.topology:
        wrong.extend(*check_labels(f"{field}.topology", {term.topology: ""}))
    if term.weight:
        wrong.whole(f"{field}.weight", term.weight, low=1, high=_MAX_WEIGHT)


def _check_toleration(wrong: Violations, field: str, toleration: instance_pb2.Toleration) -> None:
    exists = toleration.operator == instance_pb2.Toleration.OPERATOR_EXISTS
    if toleration.operator != 0 and TOLERATION_OPERATOR.from_wire(toleration.operator) is None:
        wrong.add(f"{field}.operator", "is not known: use EQUAL or EXISTS")
    if toleration.key or not exists:
        check_label_key(
            wrong, f"{field}.key", toleration.key, what="the key of taints, or use EXISTS for every taint"
        )
    if exists and toleration.value:
        wrong.add(f"{field}.value", "must be empty for EXISTS")
    elif toleration.value:
        wrong.label_value(f"{field}.value", toleration.value)
    if toleration.effect != 0 and TAINT_EFFECT.from_wire(toleration.effect) is None:
        wrong.add(f"{field}.effect", "is not known: use NO_SCHEDULE or PREFER_NO_SCHEDULE, or leave it out")


def check_constraints(
    wrong: Violations,
    at: str,
    constraints: Sequence[instance_pb2.LabelConstraint],
    *,
    most: int,
    whose: str,
) -> None:
    """Conditions on labels, ``most`` at most; ``whose`` says what has the labels."""
    if len(constraints) > most:
        wrong.add(at, f"has {len(constraints)} conditions: use at most {most}")
        return
    for index, constraint in enumerate(constraints):
        field = f"{at}[{index}]"
        exists = constraint.operator == instance_pb2.LabelConstraint.OPERATOR_EXISTS
        check_label_key(wrong, f"{field}.key", constraint.key, what=f"the label of {whose} to look at")
        if constraint.operator != 0 and LABEL_OPERATOR.from_wire(constraint.operator) is None:
            wrong.add(f"{field}.operator", "is not known: use IN, NOT_IN or EXISTS")
        if exists and constraint.values:
            wrong.add(f"{field}.values", "must be empty for EXISTS")
        if not exists and not 1 <= len(constraint.values) <= _MAX_CONSTRAINT_VALUES:
            wrong.add(
                f"{field}.values",
                f"has {len(constraint.values)} values: give 1 to {_MAX_CONSTRAINT_VALUES}, or use EXISTS",
            )
            continue
        for value in constraint.values:
            wrong.label_value(f"{field}.values", value)
