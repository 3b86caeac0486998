"""Conditions on node labels as users type them: ``zone in (a, b), disk=ssd, !gpu, arch``.

Grammar (conditions separated by commas, all must hold)::

    key in (v, ...)      the label is one of the values        key=v, key==v
    key notin (v, ...)   absent or none of the values          key not in (v, ...), key!=v
    key                  present, with any value
"""

import re
from dataclasses import dataclass
from enum import Enum

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.v1.instance_pb2 import Instance, LabelConstraint

__all__ = ["Condition", "Operator", "add_selector", "parse_selector", "selector_of"]


class Operator(Enum):
    """How the values are meant."""

    IN = "in"
    NOT_IN = "not in"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on one label; no values for EXISTS."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()


_OPERATORS = {
    Operator.IN: LabelConstraint.OPERATOR_IN,
    Operator.NOT_IN: LabelConstraint.OPERATOR_NOT_IN,
    Operator.EXISTS: LabelConstraint.OPERATOR_EXISTS,
}
_KEY = r"[A-Za-z0-9][A-Za-z0-9._/-]*"
_SET = re.compile(rf"\s*({_KEY})\s+(in|notin|not\s+in)\s*\(([^()]*)\)\s*")
_EQUALS = re.compile(rf"\s*({_KEY})\s*(==|!=|=)\s*([A-Za-z0-9._-]*)\s*")
_EXISTS = re.compile(rf"\s*({_KEY})\s*")
_HOW = "write KEY=VALUE, KEY!=VALUE, KEY in (A, B), KEY notin (A, B) or KEY, separated by commas"


def parse_selector(field: str, text: str) -> tuple[Condition, ...]:
    """The conditions of a text. InvalidArgument names the field, the place and how to write it."""
    found: list[Condition] = []
    position = 0
    while True:
        condition, end = _condition_at(field, text, position)
        found.append(condition)
        if end == len(text):
            return tuple(found)
        if text[end] != ",":
            raise _wrong(field, text, end)
        position = end + 1


def add_selector(instance: Instance, conditions: tuple[Condition, ...]) -> None:
    """Append the conditions to the instance's node_selector."""
    instance.spec.node_selector.extend(selector_of(conditions))


def selector_of(conditions: tuple[Condition, ...]) -> list[LabelConstraint]:
    """The conditions as the API has them."""
    return [LabelConstraint(key=c.key, operator=_OPERATORS[c.operator], values=c.values) for c in conditions]


def _condition_at(field: str, text: str, position: int) -> tuple[Condition, int]:
    if match := _SET.match(text, position):
        values = tuple(value.strip() for value in match[3].split(","))
        if not all(values):
            raise _wrong(field, text, match.start(3))
        return Condition(match[1], Operator.IN if match[2] == "in" else Operator.NOT_IN, values), match.end()
    if match := _EQUALS.match(text, position):
        return Condition(
            match[1], Operator.NOT_IN if match[2] == "!=" else Operator.IN, (match[3],)
        ), match.end()
    if match := _EXISTS.match(text, position):
        return Condition(match[1], Operator.EXISTS), match.end()
    raise _wrong(field, text, position)


def _wrong(field: str, text: str, position: int) -> InvalidArgument:
    rest = text[position:].strip()
    where = f"cannot be read at {shorten(rest, 32)}" if rest else "ends too early"
    return InvalidArgument.of_field(field, f"{shorten(text)} {where}: {_HOW}")
