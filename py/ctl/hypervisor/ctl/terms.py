"""Affinity, spreading, tolerations and taints as users type them.

::

    app=db                               near (or away from) instances labelled app=db, on the same node
    app in (db, cache)@hypervisor/zone   ... in the same zone; the conditions are those of ``selectors``
    gpu   gpu=yes   gpu=yes:no_schedule   tolerate the taint gpu of any value; of this one; only of this effect
"""

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.core.taints import parse_taint
from hypervisor.ctl.selectors import parse_selector, selector_of
from hypervisor.v1.instance_pb2 import AffinityTerm, SpreadTerm, TaintEffect, Toleration
from hypervisor.v1.node_pb2 import Taint

__all__ = ["affinity_of", "spread_of", "taint_key_of", "taint_of", "toleration_of"]

_EFFECTS = {
    "no_schedule": TaintEffect.TAINT_EFFECT_NO_SCHEDULE,
    "prefer_no_schedule": TaintEffect.TAINT_EFFECT_PREFER_NO_SCHEDULE,
}


def affinity_of(field: str, text: str) -> AffinityTerm:
    """A required term: ``SELECTOR`` or ``SELECTOR@TOPOLOGY``."""
    selector, topology = _term(text)
    return AffinityTerm(selector=selector_of(parse_selector(field, selector)), topology=topology)


def spread_of(field: str, text: str) -> SpreadTerm:
    """A term of spreading: ``SELECTOR`` or ``SELECTOR@TOPOLOGY``."""
    selector, topology = _term(text)
    return SpreadTerm(selector=selector_of(parse_selector(field, selector)), topology=topology)


def toleration_of(field: str, text: str) -> Toleration:
    """``KEY``, ``KEY=VALUE``, either with ``:EFFECT``; ``*`` for every taint."""
    label, effect = _with_effect(field, text, "KEY, KEY=VALUE or *, perhaps with :EFFECT")
    key, equals, value = label.partition("=")
    if equals:
        return Toleration(key=key, value=value, operator=Toleration.OPERATOR_EQUAL, effect=effect)
    return Toleration(key="" if key == "*" else key, operator=Toleration.OPERATOR_EXISTS, effect=effect)


def taint_of(field: str, text: str) -> Taint:
    """``KEY:EFFECT`` or ``KEY=VALUE:EFFECT``."""
    try:
        taint = parse_taint(text)
    except ValueError as exc:
        raise InvalidArgument.of_field(field, str(exc)) from exc
    return Taint(key=taint.key, value=taint.value, effect=_EFFECTS[taint.effect.value])


def taint_key_of(field: str, text: str) -> "tuple[str, TaintEffect.ValueType]":
    """``KEY`` or ``KEY:EFFECT``: which taints to remove."""
    return _with_effect(field, text, "KEY or KEY:EFFECT")


def _term(text: str) -> tuple[str, str]:
    selector, _, topology = text.partition("@")
    return selector, topology.strip()


def _with_effect(field: str, text: str, how: str) -> "tuple[str, TaintEffect.ValueType]":
    label, colon, effect = text.strip().partition(":")
    if not label or (colon and effect not in _EFFECTS):
        raise InvalidArgument.of_field(
            field, f"{shorten(text)} cannot be read: write {how}; EFFECT is one of {', '.join(_EFFECTS)}"
        )
    return label, _EFFECTS[effect] if colon else TaintEffect.TAINT_EFFECT_UNSPECIFIED
